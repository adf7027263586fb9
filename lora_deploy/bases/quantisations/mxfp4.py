"""MXFP4: numbers of 4 bits (E2M1) in groups of 32 that share an exponent of 8 bits; in gpt-oss, its experts.

The blocks of an expert are (rows, groups, 16 bytes), the first number of a byte in its low half; the plain model keeps
the matrix the other way around, (experts, in, out).

Law: every value is what transformers 5.23 computes; bfloat16 holds it exactly.
Source: OCP Microscaling Formats 1.0, section 5.3.3; transformers 5.23, ``integrations/mxfp4.py``
(``convert_moe_packed_tensors``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lora_deploy.bases.quantisations.interface import PackedTensor, Unpacking, expect_shape, mapped, two_to_the
from lora_deploy.checkpoint import Checkpoint
from lora_deploy.errors import MalformedCheckpointError

_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BYTES_PER_GROUP = 16
_UNIT_EXPONENT = 127
_NO_NUMBER = 255


def unpack(checkpoint: Checkpoint, _settings: Mapping[str, Any]) -> Unpacking:
    """Find packed experts by their ``_blocks``."""
    names = [name.removesuffix("_blocks") for name in checkpoint.tensors if name.endswith("_blocks")]
    return Unpacking(tensors=tuple(_packed(checkpoint, name) for name in names))


def _packed(checkpoint: Checkpoint, name: str) -> PackedTensor:
    keys = (f"{name}_blocks", f"{name}_scales")
    blocks, exponents = (mapped(checkpoint, key) for key in keys)
    if blocks.ndim != 4 or blocks.shape[-1] != _BYTES_PER_GROUP or {blocks.dtype, exponents.dtype} != {torch.uint8}:
        raise MalformedCheckpointError(
            f"{keys[0]}: found {blocks.dtype} {tuple(blocks.shape)}, expected uint8 (experts, rows, groups, 16)"
        )
    expect_shape(keys[1], exponents, blocks.shape[:-1])
    if (exponents == _NO_NUMBER).any():
        raise MalformedCheckpointError(f"{keys[1]}: a scale that is no number (E8M0 255)")
    n_experts, n_out, n_groups, _ = blocks.shape
    n_in = n_groups * _BYTES_PER_GROUP * 2
    values = torch.tensor([*_VALUES, *(-value for value in _VALUES)], dtype=torch.float64)

    def rows(start: int, stop: int) -> Tensor:
        """Rows are inputs, expert by expert; whole groups are unpacked, and of those the wanted inputs kept."""
        parts = []
        for expert in range(start // n_in, -(-stop // n_in)):
            first, last = max(start - expert * n_in, 0), min(stop - expert * n_in, n_in)
            groups = slice(first // 32, -(-last // 32))
            packed = blocks[expert, :, groups]
            codes = torch.stack((packed & 15, packed >> 4), dim=-1).reshape(n_out, -1, 32)
            exponent = exponents[expert, :, groups, None].int() - _UNIT_EXPONENT
            inputs = (values[codes.int()] * two_to_the(exponent)).reshape(n_out, -1).T
            parts.append(inputs[first - groups.start * 32 : last - groups.start * 32])
        return torch.cat(parts)

    return PackedTensor(name=name, shape=(n_experts, n_in, n_out), keys=keys, prepare=lambda: rows)
