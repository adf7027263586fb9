"""Rounding by chance: up or down with the probability that makes the expected value exact.

What a correct merge does to each weight, one rounding, is a fixed error of up to half a step. The error of rounding by
chance is as random and, on average, twice as large in the square: it shows what outputs owe to the format alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_deploy.rounding import BITS, torch_dtype
from lora_deploy.tensors import DType


def round_by_chance(values: Tensor, dtype: DType, generator: torch.Generator) -> Tensor:
    """Round float64 values to one of their two neighbours in a format; values of the format stay.

    Shapes: any; the result has the same shape and dtype float64. Beyond the format's range it is the largest value.
    """
    if dtype is DType.F64:
        return values
    target = torch_dtype(dtype)
    limit = torch.finfo(target).max
    inside = values.clamp(-limit, limit)
    near = inside.to(target)
    near = near.clamp(-limit, limit)
    at = near.to(torch.float64)
    outwards = (inside.abs() > at.abs()) | (at == 0)
    bits = near.view(BITS[dtype])
    sign = torch.where(inside < 0, torch.iinfo(bits.dtype).min, 0).to(bits.dtype)
    moved = torch.where(outwards, torch.where(at == 0, sign | 1, bits + 1), bits - 1)
    beside = moved.view(target).to(torch.float64)
    step = beside - at
    part = torch.where(step == 0, 0.0, (inside - at) / torch.where(step == 0, 1.0, step))
    chosen = torch.rand(values.shape, generator=generator, dtype=torch.float64) < part
    return torch.where(chosen & beside.isfinite(), beside, at)
