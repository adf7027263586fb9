"""Rounding real values to a storage format: once, to nearest, ties to even.

Promise: ``round_once`` gives the correctly rounded float64; torch's own float64 -> 16-bit cast does not, because it
goes through float32. ``round_fraction`` does the same for an exact rational. Neither saturates: what is too large
becomes an infinity, which the caller refuses.

Why float32 is almost enough: every boundary between two 16-bit values (normal or subnormal) is itself a float32 value.
So the float32 nearest to x lies on the same side of every boundary as x does, unless it *is* the boundary. Those few
elements are found by rounding the float32 value's two neighbours: if both round to the same 16-bit value, no boundary
is near; if not, the sign of x minus the boundary decides.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from lora_deploy.tensors import DType

_MANTISSA_BITS = {DType.F64: 53, DType.F32: 24, DType.F16: 11, DType.BF16: 8}
_MIN_EXPONENT = {DType.F64: -1074, DType.F32: -149, DType.F16: -24, DType.BF16: -133}
_MAX = {
    DType.F64: 1.7976931348623157e308,
    DType.F32: 3.4028234663852886e38,
    DType.F16: 65504.0,
    DType.BF16: 3.3895313892515355e38,
}
_AFTER_MAX = {DType.F32: 2.0**128, DType.F16: 65536.0, DType.BF16: 2.0**128}
"""What would follow the largest value, did the format go on: halfway to it, rounding to infinity begins."""


BITS = {DType.F64: torch.int64, DType.F32: torch.int32, DType.F16: torch.int16, DType.BF16: torch.int16}
"""Integer type as wide as each floating format."""


def torch_dtype(dtype: DType) -> torch.dtype:
    """The tensor library's name of a storage format."""
    found: torch.dtype = getattr(torch, dtype.long_name)
    return found


def largest(dtype: DType) -> float:
    """Largest finite value of a floating format."""
    return _MAX[dtype]


def round_once(values: Tensor, dtype: DType) -> Tensor:
    """Round float64 values to a floating format, each once.

    Shapes: any; the result has the same shape.
    """
    if dtype is DType.F64:
        return values
    if dtype is DType.F32:
        return values.to(torch.float32)
    target = torch_dtype(dtype)
    single = values.to(torch.float32)
    rounded = single.to(target)
    above, below = neighbours(single, target)
    # The negated comparison keeps NaN (the neighbour of an infinity) among the unsettled, where it does no harm.
    unsettled = (above != below).nonzero(as_tuple=True)
    if unsettled[0].numel():
        high, low = _wide(above[unsettled], dtype), _wide(below[unsettled], dtype)
        exact, boundary = values[unsettled], (high + low) / 2
        chosen = rounded[unsettled].to(torch.float64)
        chosen = torch.where(exact > boundary, torch.maximum(high, low), chosen)
        chosen = torch.where(exact < boundary, torch.minimum(high, low), chosen)
        rounded[unsettled] = chosen.to(target)
    return rounded


def neighbours(single: Tensor, target: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round the float32 values next to these, away from zero and towards it, to a 16-bit format."""
    bits = single.view(torch.int32)
    return (bits + 1).view(torch.float32).to(target), (bits - 1).view(torch.float32).to(target)


def round_pair(values: Tensor, rests: Tensor, dtype: DType) -> Tensor:
    """Round the unevaluated sums ``values + rests`` once.

    Each |rest| is at most two float64 units in the last place of its value, unless the format is F64: then any.

    Shapes: both (n,) float64; the result is (n,).
    """
    if dtype is DType.F64:
        return values + rests
    chosen = round_once(values, dtype)
    start = _wide(chosen, dtype)
    remainder = values - start  # exact: both are multiples of the float64 unit of ``values``
    beside = _beside(chosen, remainder > 0)
    boundary = (start + _wide(beside, dtype)) / 2
    beyond = (values - boundary) + rests
    is_past = torch.where(remainder > 0, beyond > 0, beyond < 0) & (remainder != 0)
    is_tie = (beyond == 0) & (remainder != 0)
    is_odd = (chosen.view(BITS[dtype]) & 1).bool()
    return torch.where(is_past | (is_tie & is_odd), beside, chosen)


def _wide(values: Tensor, dtype: DType) -> Tensor:
    """Float64, with what follows the largest value in place of infinity; NaN, which compares with nothing, stays."""
    return values.to(torch.float64).clamp(-_AFTER_MAX[dtype], _AFTER_MAX[dtype])


def _beside(values: Tensor, upwards: Tensor) -> Tensor:
    """The next representable value above or below; of a zero, the smallest subnormal."""
    bits_type = BITS[dtype_of(values)]
    bits = values.view(bits_type)
    towards_zero = upwards != (values > 0)
    sign = torch.where(upwards, 0, torch.iinfo(bits_type).min).to(bits_type)
    moved = torch.where(towards_zero, bits - 1, bits + 1)
    return torch.where(values == 0, sign | 1, moved).view(values.dtype)


def dtype_of(tensor: Tensor) -> DType:
    """Our name of a tensor's format."""
    return DType.from_long_name(str(tensor.dtype))


def round_fraction(value: Fraction, dtype: DType) -> float:
    """Round an exact rational to the nearest value of a floating format, ties to even; infinity beyond its range."""
    if not value:
        return 0.0
    size = abs(value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if Fraction(2) ** exponent > size:
        exponent -= 1
    quantum = Fraction(2) ** max(exponent - _MANTISSA_BITS[dtype] + 1, _MIN_EXPONENT[dtype])
    rounded = round(size / quantum) * quantum  # Python rounds a Fraction's half to even
    result = float(rounded) if rounded <= Fraction(_MAX[dtype]) else math.inf
    return -result if value < 0 else result
