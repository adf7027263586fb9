"""The peer: transformers' own exporter, both graphs of a decoder, fused for the CPU, as its documentation does it.

Usage: transformers_export.py MODEL OUT
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM
from transformers.exporters.configs import OnnxConfig
from transformers.exporters.exporter_onnx import OnnxExporter


def main(folder: str, out: str) -> None:
    """Export prefill and decode."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(10, model.config.vocab_size, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, 0] = 0  # an exporter drops a mask that is all ones
    config = OnnxConfig(dynamic=True, ort_fusions="cpu")
    exported = OnnxExporter().export_for_generation(model, {"input_ids": ids, "attention_mask": mask}, config)
    exported.save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
