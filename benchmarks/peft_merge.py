"""The peer: load base and adapter with transformers and PEFT, ``merge_and_unload``, save, flush to disk."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def main(base: str, adapter: str, out: str, device: str = "cpu") -> None:
    """Merge as PEFT's documentation does."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).to(device)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.save_pretrained(out)
    for path in Path(out).iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


if __name__ == "__main__":
    main(*sys.argv[1:])
