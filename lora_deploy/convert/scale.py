"""Which alpha, over which rank, is exactly the scale that was read.

A scale is a rational number, or one over a square root; a format computes alpha / r or alpha / √r. Where alpha would
not be a number that the format can hold, a larger rank may make it one: factors are padded with zeros.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from lora_deploy.updates.interface import Scale

_MOST_PADDING = 2
"""Times the rank: the next power of two, which makes every float64 scale exact, and a square number are within it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alpha:
    """A representation of a scale."""

    alpha: int | float
    rank: int


def exact_alpha(scale: Scale, rank: int, *, is_rank_stabilised: bool = False, single: bool = False) -> Alpha | None:
    """Find the least rank over which some alpha gives the scale exactly; None where none does.

    ``single``: alpha is a float32 number.
    """
    root = math.isqrt(scale.root)
    if root * root != scale.root:
        if scale.root < rank or not is_rank_stabilised:
            return None
        alpha = _number(scale.factor, single=single)
        return None if alpha is None else Alpha(alpha=alpha, rank=scale.root)
    factor = scale.factor / root
    for padded in range(rank, _MOST_PADDING * rank + 3):
        divisor = math.isqrt(padded) if is_rank_stabilised else padded
        if is_rank_stabilised and divisor * divisor != padded:
            continue
        alpha = _number(factor * divisor, single=single)
        if alpha is not None:
            return Alpha(alpha=alpha, rank=padded)
    return None


def needs_root(scale: Scale) -> bool:
    """Whether the scale is irrational: no alpha / r is it."""
    return math.isqrt(scale.root) ** 2 != scale.root


def _number(value: Fraction, *, single: bool) -> int | float | None:
    """The value as a number of JSON or of a tensor, if it is one."""
    try:
        nearest = float(value)
    except OverflowError:
        return None
    if Fraction(nearest) != value:
        return None
    if single and not _is_single(nearest):
        return None
    return int(nearest) if nearest.is_integer() and abs(nearest) < 1 << 53 else nearest


def _is_single(value: float) -> bool:
    """Whether float32 holds it: 24 bits, and an exponent within its range."""
    mantissa, exponent = math.frexp(value)
    return not value or (-125 <= exponent <= 128 and (mantissa * (1 << 24)).is_integer())
