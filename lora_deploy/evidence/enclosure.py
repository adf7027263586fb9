"""Enclosures: for each element of a tensor, two values between which the result of a computation must lie.

Promise: every operation maps an enclosure of its arguments to one of its result. Rounding is monotone, so the
enclosure of a rounded value is the rounded ends; what a float32 product may lose is added as an explicit error. Ends
are moved outward by one unit of float64 wherever float64 itself may have rounded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_deploy.rounding import round_once
from lora_deploy.tensors import DType


@dataclass(frozen=True, slots=True, eq=False)
class Enclosure:
    """Element-wise bounds; both tensors float64 of one shape."""

    low: Tensor
    high: Tensor

    @classmethod
    def exactly(cls, values: Tensor) -> Enclosure:
        """Enclose known float64 values."""
        return cls(values, values)

    def widened(self, error: Tensor | float) -> Enclosure:
        """Allow for an absolute error."""
        return _outward(self.low - error, self.high + error)

    def widened_by(self, ratio: float) -> Enclosure:
        """Allow for a relative error."""
        return self.widened(torch.maximum(self.low.abs(), self.high.abs()) * ratio)

    def rounded(self, dtype: DType) -> Enclosure:
        """Round to a format, to nearest."""
        if dtype is DType.F64:
            return self
        low = round_once(self.low, dtype).to(torch.float64)
        high = low if self.high is self.low else round_once(self.high, dtype).to(torch.float64)
        return Enclosure(low, high)

    def __add__(self, other: Enclosure) -> Enclosure:
        return Enclosure(_sum(self.low, other.low, -torch.inf), _sum(self.high, other.high, torch.inf))

    def __sub__(self, other: Enclosure) -> Enclosure:
        return Enclosure(_sum(self.low, -other.high, -torch.inf), _sum(self.high, -other.low, torch.inf))

    def __mul__(self, other: Enclosure) -> Enclosure:
        return _hull(*(a * b for a in (self.low, self.high) for b in (other.low, other.high)))

    def __truediv__(self, other: Enclosure) -> Enclosure:
        """Divide by what does not enclose zero."""
        return _hull(*(a / b for a in (self.low, self.high) for b in (other.low, other.high)))

    def where(self, condition: Tensor, other: Enclosure) -> Enclosure:
        """Keep these elements where the condition holds, take the other's elsewhere."""
        return Enclosure(
            torch.where(condition, self.low, other.low),
            torch.where(condition, self.high, other.high),
        )

    def contains(self, values: Tensor) -> Tensor:
        """Which values lie between the bounds; what is not finite never does."""
        return (self.low <= values) & (values <= self.high) & values.isfinite()


def _sum(a: Tensor, b: Tensor, outward: float) -> Tensor:
    """Add; move outward only where float64 rounded, so that an exact tie stays one (error-free sum: Knuth's)."""
    total = a + b
    shift = total - a
    is_exact = (a - (total - shift)) + (b - shift) == 0
    return torch.where(is_exact, total, torch.nextafter(total, torch.full_like(total, outward)))


def _hull(first: Tensor, *others: Tensor) -> Enclosure:
    low = high = first
    for other in others:
        low, high = torch.minimum(low, other), torch.maximum(high, other)
    return _outward(low, high)


def _outward(low: Tensor, high: Tensor) -> Enclosure:
    infinity = torch.full_like(low, torch.inf)
    return Enclosure(torch.nextafter(low, -infinity), torch.nextafter(high, infinity))
