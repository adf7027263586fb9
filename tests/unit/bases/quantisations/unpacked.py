"""Open a checkpoint of packed tensors as a base, dequantised."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_deploy.bases import open_base
from lora_deploy.checkpoint import Checkpoint
from lora_deploy.rounding import torch_dtype
from tests.builders import make_checkpoint

LAYER = "model.layers.0.mlp.up_proj"


def unpacked(
    folder: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any] | None, **config: Any
) -> Checkpoint:
    declared = {} if settings is None else {"quantization_config": dict(settings)}
    make_checkpoint(folder, tensors, {**config, **declared})
    return open_base(str(folder), dequantize=True)


def tensor_of(checkpoint: Checkpoint, name: str) -> Tensor:
    spec = checkpoint.tensors[name]
    return torch.frombuffer(bytearray(checkpoint.read(name)), dtype=torch_dtype(spec.dtype)).reshape(spec.shape)
