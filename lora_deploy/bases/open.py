"""Open a base by what the user typed."""

from __future__ import annotations

from pathlib import Path

from lora_deploy.checkpoint import Checkpoint, CheckpointRef, open_checkpoint
from lora_deploy.errors import InputError


def open_base(reference: str, *, dequantize: bool = False) -> Checkpoint:
    """Open a folder or a ``.safetensors`` file.

    Raises:
        InputError: There is no such base, or it is not what it claims to be.
    """
    del dequantize
    path = Path(reference)
    if path.is_dir():
        return open_checkpoint(path, ref=CheckpointRef(name=reference))
    if path.suffix == ".safetensors" and path.is_file():
        return open_checkpoint(path.parent, ref=CheckpointRef(name=reference), files=(path.name,))
    raise InputError(f"base {reference}: no such folder or file")
