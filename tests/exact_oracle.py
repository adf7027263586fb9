"""The definition of the merge, slowly: rationals throughout, rounding by search. It shares no code with the product."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from lora_deploy.tensors import DType
from lora_deploy.updates.low_rank import LowRank

_LAYOUT = {
    DType.F16: ("<e", "<H", 0, 0x7C00),
    DType.F32: ("<f", "<I", 0, 0x7F800000),
    DType.F64: ("<d", "<Q", 0, 0x7FF << 52),
}
_LAYOUT[DType.BF16] = ("<f", "<I", 16, 0x7F80)
TORCH = {DType.F16: torch.float16, DType.BF16: torch.bfloat16, DType.F32: torch.float32, DType.F64: torch.float64}


def decode(bits: int, dtype: DType) -> float:
    """Give the non-negative number that these bits store."""
    as_float, as_int, shift, _ = _LAYOUT[dtype]
    (value,) = struct.unpack(as_float, struct.pack(as_int, bits << shift))
    return float(value)


def infinity_bits(dtype: DType) -> int:
    """Bits of +infinity, one more than those of the largest number."""
    return _LAYOUT[dtype][3]


def nearest(value: Fraction, dtype: DType) -> float:
    """Find the stored number nearest to a rational, ties to even, by bisection: numbers are ordered as their bits."""
    size, low, high = abs(value), 0, infinity_bits(dtype)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if Fraction(decode(middle, dtype)) <= size else (low, middle)
    below = Fraction(decode(low, dtype))
    step = Fraction(decode(low, dtype)) - Fraction(decode(low - 1, dtype)) if high == infinity_bits(dtype) else None
    above = below + step if step is not None else Fraction(decode(high, dtype))
    is_nearer_above = 2 * size > below + above or (2 * size == below + above and low % 2)
    result = decode(high if is_nearer_above else low, dtype)
    return -result if value < 0 else result


def exact_sum(weight: Tensor, updates: Sequence[LowRank], row: int, col: int) -> Fraction:
    """W + Σ s·up·down of one element."""
    total = Fraction(float(weight[row, col]))
    for update in updates:
        scale = Fraction(update.scale.value)
        for k in range(update.rank):
            total += scale * Fraction(float(update.up[row, k])) * Fraction(float(update.down[k, col]))
    return total


def merged_exactly(weight: Tensor, updates: Sequence[LowRank], dtype: DType) -> list[list[float]]:
    """RN(W + Σ s·up·down) of every element; infinite where it exceeds the format."""
    n_rows, n_cols = weight.shape
    return [[nearest(exact_sum(weight, updates, i, j), dtype) for j in range(n_cols)] for i in range(n_rows)]


def same_float(one: float, other: float) -> bool:
    """Whether two numbers are equal to the sign of zero."""
    return one == other and math.copysign(1, one) == math.copysign(1, other)
