"""Rounding by chance: up or down with the probability that makes the expected value exact.

What a correct merge does to each weight, one rounding, is a fixed error of up to half a step. The error of rounding by
chance is as random and, on average, twice as large in the square: it shows what outputs owe to the format alone.

How: a random number below one step is added to the magnitude, and what is below the step is cut off. On the bits of the
wider format, both are integer operations; where the narrow format's steps stop shrinking, they are floor and scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_deploy.rounding import torch_dtype
from lora_deploy.tensors import DType


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wide:
    """The format in which the work is done, and what of its bits the narrow one lacks."""

    dtype: torch.dtype
    bits: torch.dtype
    n_cut: int


_WIDE = {
    DType.BF16: _Wide(dtype=torch.float32, bits=torch.int32, n_cut=16),
    DType.F16: _Wide(dtype=torch.float32, bits=torch.int32, n_cut=13),
    DType.F32: _Wide(dtype=torch.float64, bits=torch.int64, n_cut=29),
}


def round_by_chance(values: Tensor, dtype: DType, generator: torch.Generator) -> Tensor:
    """Round values to one of their two neighbours in a format; values of the format stay.

    Shapes: any, float32 or float64; the result has the same shape, in float32. Values are first brought to the format
    in which the work is done (float32 for 16 bits), which is finer by 2¹³ or more. Beyond the range they become the
    largest value.
    """
    wide = _WIDE[dtype]
    limits = torch.finfo(torch_dtype(dtype))
    exact = values.to(wide.dtype, copy=True).clamp_(-limits.max, limits.max)
    chance = torch.randint(1 << wide.n_cut, exact.shape, generator=generator, dtype=wide.bits)
    bits = exact.view(wide.bits)
    rounded = ((bits + chance) & ~((1 << wide.n_cut) - 1)).view(wide.dtype)
    small = exact.abs() < limits.smallest_normal
    if bool((small & (exact != 0)).any()):
        step = limits.smallest_normal * limits.eps
        size = (exact.abs() / step + chance.to(wide.dtype) / (1 << wide.n_cut)).floor() * step
        rounded = torch.where(small, size.copysign(exact), rounded)
    return rounded.to(torch.float32)
