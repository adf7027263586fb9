"""The sum of a region's low-rank updates, ready to be evaluated: fast, more precisely, and exactly.

Promise: ``exact`` is W + Σ s·up·down of the stored numbers, as a rational; ``compensated`` knows how far it may be from
that. Both read the factors as stored; only ``left`` and ``right`` are rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property

import torch
from torch import Tensor

from lora_deploy.merge.single import SingleFactors
from lora_deploy.updates.low_rank import LowRank

UNIT = 2.0**-53
"""Largest relative error of one float64 operation."""
_LEAST, _MOST = 2.0**-200, 2.0**200
"""Magnitudes between which no product of a scale and two factors, and no rounding error of it, over- or underflows:
such float64 numbers are multiples of 2^-252, products of three multiples of 2^-756. All 32-bit numbers lie there."""


class Factors:
    """The sum of a region's low-rank updates, prepared once: one float64 product of inner dimension R = Σ r."""

    def __init__(self, updates: Sequence[LowRank], device: torch.device) -> None:
        self.updates = tuple(updates)
        self.left = torch.cat(
            [update.up.to(device, torch.float64) * update.scale.value for update in self.updates], dim=1
        )
        """(n_rows, R): s·up, rounded once."""
        self.right = torch.cat([update.down.to(device, torch.float64) for update in self.updates], dim=0)
        """(R, n_cols)."""
        self.unit = (self.rank + 8) * UNIT
        """Relative error bound of one element against |W| + Σ|s·up|·|down|."""
        self.row_reach = self.left.abs() @ _largest_of_rows(self.right)
        """(n_rows,): bound of Σ|s·up|·|down| over each row."""
        self.is_finite = bool(self.left.isfinite().all()) and bool(self.right.isfinite().all())
        self.largest = max(
            (float(matrix.abs().max()) for matrix in (self.left, self.right) if matrix.numel()), default=0.0
        )
        """Of all elements of ``left`` and ``right``."""
        self.is_plain = all(map(_is_plain, self.updates))
        """Whether float64 arithmetic on them has no over- or underflow; if not, only rationals tell the truth."""

    @cached_property
    def single(self) -> SingleFactors:
        """As the compiled pass takes them; of the CPU."""
        return SingleFactors(self.left, self.right)

    @property
    def rank(self) -> int:
        """Inner dimension R of the whole sum."""
        return int(self.left.shape[1])

    @property
    def delta_square(self) -> float:
        """‖Δ‖² of the whole region from the small Gram matrices, never forming Δ."""
        gram = (self.left.T @ self.left) * (self.right @ self.right.T)
        return max(0.0, float(gram.sum()))

    def size(self, weight: Tensor, row: Tensor, col: Tensor) -> Tensor:
        """|W| + Σ|s·up|·|down| of some elements, which their errors are relative to; all (n,)."""
        return weight.abs() + (self.left[row] * self.right[:, col].T).abs().sum(dim=1)

    def compensated(self, weight: Tensor, row: Tensor, col: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """W + Σ s·up·down of some elements as an unevaluated pair (high, low) and a bound of what the pair misses.

        The bound is 0 where every rounding error turned out to be representable, so that the pair is the exact value:
        the usual case for real ties, which only happen between numbers of few bits. The factors must be plain.

        Shapes: all (n,) float64; ``size`` is |W| + Σ|s·up|·|down|.
        Source: error-free transformations; Ogita, Rump, Oishi, Accurate Sum and Dot Product, 2005, algorithm Dot2.
        """
        is_exact = torch.ones_like(weight, dtype=torch.bool)
        large, small = [weight[None]], []
        for update in self.updates:
            ups = update.up[row.to(update.up.device)].T.to(weight.device, torch.float64)
            downs = update.down[:, col.to(update.down.device)].to(weight.device, torch.float64)
            products, rests = _two_product(ups, downs)
            total, sum_rests = _two_sum_all(products)
            rest, lost = _two_sum_all(torch.cat([rests, sum_rests]))
            is_exact &= (lost == 0).all(dim=0)
            scaled, scale_rests = _two_product(torch.stack([total, rest]), total.new_tensor(update.scale.value))
            large.append(scaled)
            small.append(scale_rests)
        high, sum_rests = _two_sum_all(torch.cat(large))
        low, lost = _two_sum_all(torch.cat([*small, sum_rests]))
        is_exact &= (lost == 0).all(dim=0)
        high, low = _two_sum(high, low)
        n_terms = 2 * self.rank + 8 * len(self.updates) + 16
        return high, low, torch.where(is_exact, 0.0, size * (n_terms * UNIT) ** 2)

    def exact(self, weight: float, row: int, col: int) -> Fraction:
        """W + Σ s·up·down of one element, exactly."""
        total = Fraction(weight)
        for update in self.updates:
            product = _dot(update.up[row].tolist(), update.down[:, col].tolist())
            total += Fraction(update.scale.value) * product
        return total


def _largest_of_rows(matrix: Tensor) -> Tensor:
    return matrix.abs().amax(dim=1) if matrix.numel() else matrix.new_zeros(matrix.shape[0])


def _is_plain(update: LowRank) -> bool:
    scale = abs(update.scale.value)
    if scale and not _LEAST <= scale <= _MOST:
        return False
    for factor in (update.up, update.down):
        if factor.dtype == torch.float64 and factor.numel():
            sizes = factor.abs()
            if bool(((sizes != 0) & ((sizes < _LEAST) | (sizes > _MOST))).any()):
                return False
    return True


def _dot(left: Sequence[float], right: Sequence[float]) -> Fraction:
    """Σ left·right. Denominators of floats are powers of two, so the largest of the products' is a common one."""
    ratios = [(a.as_integer_ratio(), b.as_integer_ratio()) for a, b in zip(left, right, strict=True)]
    products = [(a[0] * b[0], a[1] * b[1]) for a, b in ratios]
    common = max((denominator for _, denominator in products), default=1)
    return Fraction(sum(numerator * (common // denominator) for numerator, denominator in products), common)


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Give sum and rest: a + b = sum + rest, exactly (Knuth)."""
    total = a + b
    shift = total - a
    return total, (a - (total - shift)) + (b - shift)


def _two_sum_all(terms: Tensor) -> tuple[Tensor, Tensor]:
    """Give the sum of m rows and the m - 1 rests of its additions, pair by pair: what the sum misses is their sum."""
    if not len(terms):
        return terms.new_zeros(terms.shape[1]), terms
    rests = [terms[:0]]
    while len(terms) > 1:
        half = len(terms) // 2
        totals, rest = _two_sum(terms[:half], terms[half : 2 * half])
        terms = torch.cat([totals, terms[2 * half :]])
        rests.append(rest)
    return terms[0], torch.cat(rests)


def _two_product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Give product and rest: a * b = product + rest, exactly while nothing over- or underflows (Dekker)."""
    product = a * b
    (a_high, a_low), (b_high, b_low) = _split(a), _split(b)
    return product, a_low * b_low - (((product - a_high * b_high) - a_low * b_high) - a_high * b_low)


def _split(a: Tensor) -> tuple[Tensor, Tensor]:
    shifted = a * 134217729.0  # 2^27 + 1
    high = shifted - (shifted - a)
    return high, a - high
