"""Where a weight meets its low-rank updates: RN(W + Σ s·up·down), the exact real value rounded once.

Promise (laws 1 and 2): the bytes do not depend on BLAS, tile, thread or device. Every element is evaluated in float64
with a proven error bound; where the bound leaves the rounding open, the element is recomputed as an exact rational.

How it stays fast. A tile of float64 values v fits the L2 cache. Level 1 rounds, for every element, two values that
enclose everything v could be; where they agree, as they do for all but about 1 in 20,000 (bfloat16), 3,000 (float16)
or 500 (float32), that is the result. Level 2 takes the open elements of a whole chunk together, with a bound for each;
level 3 evaluates what is left with error-free transformations, which settles true ties too. Level 4 is ``fractions``,
for what even that cannot separate.

The error bound. Each product s·up·down carries two roundings and the sum of R of them and W at most R + 1, in any
order, with or without fused operations; so |v - exact| <= (R + 8)·2^-53·(|W| + Σ|s·up|·|down|), to first order and
with room for the rest (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from lora_deploy.errors import NonFiniteTensorError
from lora_deploy.rounding import BITS, largest, round_fraction, round_once, round_pair, torch_dtype
from lora_deploy.tensors import DType
from lora_deploy.updates.low_rank import LowRank

TILE_ELEMENTS = 1 << 17
"""Elements of a tile: its float64 values take 1 MiB, which fits the L2 cache of a server core."""
TILE_COLS = 2048
_UNIT = 2.0**-53
_F32_SPREAD = 2.0**-34
_SETTLED_AT_ONCE = 1 << 14
_SAFE_MIN, _SAFE_MAX = 2.0**-800, 2.0**800
"""Magnitudes between which no step of the compensated sum over- or underflows, for factors of 32 bits or fewer."""


@dataclass(slots=True, kw_only=True)
class BlockFacts:
    """What was seen while a block was computed; adds up over blocks."""

    n_elements: int = 0
    max_abs: float = 0.0
    """Largest |W'| of the result."""
    weight_square: float = 0.0
    """Σ W² of the weights before the update."""
    delta_square: float = 0.0
    """Σ Δ²; filled in where Δ is formed element by element."""
    error_square: float = 0.0
    """Σ (stored - exact)²."""
    n_underflowed: int = 0
    """Elements that were not zero and are stored as zero."""
    n_exact: int = 0
    """Elements that only exact rational arithmetic could settle."""

    def add(self, other: BlockFacts) -> None:
        """Take in the facts of another block of the same tensor."""
        self.n_elements += other.n_elements
        self.max_abs = max(self.max_abs, other.max_abs)
        self.weight_square += other.weight_square
        self.delta_square += other.delta_square
        self.error_square += other.error_square
        self.n_underflowed += other.n_underflowed
        self.n_exact += other.n_exact


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
        self.unit = (self.left.shape[1] + 8) * _UNIT
        """Relative error bound of one element against |W| + Σ|s·up|·|down|."""
        reach = self.right.abs().amax(dim=1) if self.right.numel() else self.right.new_zeros(self.right.shape[0])
        self.row_reach = self.left.abs() @ reach
        """(n_rows,): bound of Σ|s·up|·|down| over each row."""

    @property
    def delta_square(self) -> float:
        """‖Δ‖² of the whole region from the small Gram matrices, never forming Δ."""
        gram = (self.left.T @ self.left) * (self.right @ self.right.T)
        return max(0.0, float(gram.sum()))

    def compensated(self, weight: Tensor, row: Tensor, col: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """W + Σ s·up·down of some elements as an unevaluated pair (high, low) and a bound of what the pair misses.

        The bound is 0 where every rounding error turned out to be representable, so that the pair is the exact value:
        the usual case for real ties, which only happen between numbers of few bits.

        Shapes: all (n,) float64; ``size`` is |W| + Σ|s·up|·|down|.
        Source: error-free transformations; Ogita, Rump, Oishi, Accurate Sum and Dot Product, 2005, algorithm Dot2.
        """
        high, low = weight, torch.zeros_like(weight)
        is_exact = torch.ones_like(weight, dtype=torch.bool)
        for update in self.updates:
            scale = torch.full_like(weight, update.scale.value)
            total, rest = torch.zeros_like(weight), torch.zeros_like(weight)
            ups = update.up[row.to(update.up.device)].to(weight.device, torch.float64)
            downs = update.down[:, col.to(update.down.device)].to(weight.device, torch.float64)
            for k in range(update.rank):
                product, product_rest = _two_product(ups[:, k], downs[k])
                total, sum_rest = _two_sum(total, product)
                for term in (product_rest, sum_rest):
                    rest, lost = _two_sum(rest, term)
                    is_exact &= lost == 0
            for factor in (total, rest):
                product, product_rest = _two_product(factor, scale)
                high, sum_rest = _two_sum(high, product)
                for term in (product_rest, sum_rest):
                    low, lost = _two_sum(low, term)
                    is_exact &= lost == 0
        high, low = _two_sum(high, low)
        n_terms = 2 * self.left.shape[1] + 8 * len(self.updates) + 16
        is_exact &= (size < _SAFE_MAX) & ((size > _SAFE_MIN) | (size == 0))
        return high, low, torch.where(is_exact, 0.0, size * (n_terms * _UNIT) ** 2 + _SAFE_MIN)

    def exact(self, weight: float, row: int, col: int) -> Fraction:
        """W + Σ s·up·down of one element, exactly."""
        total = Fraction(weight)
        for update in self.updates:
            ups, downs = update.up[row].tolist(), update.down[:, col].tolist()
            product = sum((Fraction(a) * Fraction(b) for a, b in zip(ups, downs, strict=True)), Fraction(0))
            total += Fraction(update.scale.value) * product
        return total


class Workspace:
    """Buffers of one worker, reused from tile to tile; not shared between threads."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, use: str, dtype: torch.dtype, rows: int, cols: int) -> Tensor:
        """Give an uninitialised contiguous (rows, cols) buffer; the same use and dtype share memory."""
        key = (use, dtype)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < rows * cols:
            buffer = torch.empty(max(rows * cols, TILE_ELEMENTS), dtype=dtype, device=self.device)
            self._buffers[key] = buffer
        return buffer[: rows * cols].view(rows, cols)


def merge_rows(
    name: str, weights: Tensor, factors: Factors, rows: slice, dtype: DType, workspace: Workspace
) -> tuple[Tensor, BlockFacts]:
    """Merge some rows of a region.

    Shapes: weights (n, n_cols) in the base's dtype: rows ``rows`` of the region; the result (n, n_cols) in ``dtype``.

    Raises:
        NonFiniteTensorError: A weight is not finite, or a merged value exceeds the output dtype's range.
    """
    n_rows, n_cols = weights.shape
    left = factors.left[rows]
    reach = factors.row_reach[rows]
    merged = torch.empty((n_rows, n_cols), dtype=torch_dtype(dtype), device=workspace.device)
    facts = BlockFacts(n_elements=merged.numel())
    open_flat: list[Tensor] = []
    open_values: list[Tensor] = []
    tile_cols = min(n_cols, TILE_COLS)
    tile_rows = max(1, TILE_ELEMENTS // max(1, tile_cols))
    for top in range(0, n_rows, tile_rows):
        band = slice(top, min(top + tile_rows, n_rows))
        floor = float(reach[band].max()) if reach[band].numel() else 0.0
        for first in range(0, n_cols, tile_cols):
            tile = slice(first, min(first + tile_cols, n_cols))
            values = workspace.take("values", torch.float64, band.stop - band.start, tile.stop - tile.start)
            values.copy_(weights[band, tile])
            flat = values.view(-1)
            facts.weight_square += float(torch.dot(flat, flat))
            values.addmm_(left[band], factors.right[:, tile])
            found = _round_tile(values, merged[band, tile], dtype, floor * factors.unit, workspace, facts)
            if found.numel():
                row, col = found // (tile.stop - tile.start), found % (tile.stop - tile.start)
                open_flat.append((row + band.start) * n_cols + col + tile.start)
                open_values.append(flat[found])
    if open_flat:
        _settle(weights, factors, rows, merged, dtype, torch.cat(open_flat), torch.cat(open_values), facts)
    _refuse_non_finite(name, weights, merged, facts, rows.start or 0, dtype)
    return merged, facts


def _round_tile(
    values: Tensor, merged: Tensor, dtype: DType, error: float, workspace: Workspace, facts: BlockFacts
) -> Tensor:
    """Level 1: write the rounded tile; give the flat positions that are still open.

    ``error`` bounds the part of the float64 error that does not shrink with the value itself.
    """
    if dtype is DType.F64:
        merged.copy_(values)
        facts.max_abs = max(facts.max_abs, _max_abs(values))
        return torch.arange(values.numel(), device=values.device)
    shape = values.shape
    target = torch_dtype(dtype)
    low = workspace.take("low", target, *shape)
    high = workspace.take("high", target, *shape)
    if dtype is DType.F32:
        spread = workspace.take("spread", torch.float64, *shape)
        high.copy_(torch.mul(values, 1 + _F32_SPREAD, out=spread))
        low.copy_(torch.mul(values, 1 - _F32_SPREAD, out=spread))
        threshold = 4 * error / _F32_SPREAD
        bits_type, magnitude_mask = torch.int32, 0x7FFFFFFF
    else:
        single = workspace.take("single", torch.float32, *shape)
        bits = workspace.take("bits", torch.int32, *shape)
        single.copy_(values)
        torch.add(single.view(torch.int32), 1, out=bits)
        high.copy_(bits.view(torch.float32))
        bits.sub_(2)
        low.copy_(bits.view(torch.float32))
        threshold = 4 * error * 2.0**25
        bits_type, magnitude_mask = torch.int16, 0x7FFF
    merged.copy_(low)
    low_bits = low.view(bits_type)
    high_bits = high.view(bits_type)
    found = _differing(high_bits.bitwise_xor_(low_bits))
    magnitude = torch.bitwise_and(low_bits, magnitude_mask, out=high_bits)
    smallest, biggest = (int(bound) for bound in torch.aminmax(magnitude))
    facts.max_abs = max(facts.max_abs, _from_bits(biggest, bits_type, target))
    if not smallest:
        facts.n_underflowed += int(((magnitude == 0) & (values != 0)).sum())
    floor_bits = _bits_above(threshold, bits_type, target)
    if smallest <= floor_bits:
        found = torch.cat([found, (magnitude.view(-1) <= floor_bits).nonzero().view(-1)]).unique()
    _add_error(values, low, dtype, workspace, facts)
    return found


def _differing(differences: Tensor) -> Tensor:
    """Flat positions of the non-zero elements of a contiguous integer buffer, read eight bytes at a time."""
    flat = differences.view(-1)
    lanes = 8 // flat.element_size()
    n_whole = flat.numel() // lanes * lanes
    words = flat[:n_whole].view(torch.int64).nonzero().view(-1)
    candidates = (words[:, None] * lanes + torch.arange(lanes, device=flat.device)).view(-1)
    if n_whole < flat.numel():
        candidates = torch.cat([candidates, torch.arange(n_whole, flat.numel(), device=flat.device)])
    return candidates[flat[candidates] != 0]


def _add_error(values: Tensor, stored: Tensor, dtype: DType, workspace: Workspace, facts: BlockFacts) -> None:
    wide_type = torch.float64 if dtype is DType.F32 else torch.float32
    wide = workspace.take("wide", wide_type, *values.shape)
    wide.copy_(stored)
    exact = values if dtype is DType.F32 else workspace.take("single", torch.float32, *values.shape)
    flat = wide.sub_(exact).view(-1)
    facts.error_square += float(torch.dot(flat, flat))


def _settle(
    weights: Tensor,
    factors: Factors,
    rows: slice,
    merged: Tensor,
    dtype: DType,
    flat: Tensor,
    values: Tensor,
    facts: BlockFacts,
) -> None:
    """Levels 2 to 4: settle the open elements of a chunk in place."""
    n_cols, first_row = weights.shape[1], rows.start or 0
    for part in torch.arange(flat.numel(), device=flat.device).split(_SETTLED_AT_ONCE):
        row, col = flat[part] // n_cols, flat[part] % n_cols
        weight = weights[row, col].to(torch.float64)
        size = weight.abs() + (factors.left[row + first_row] * factors.right[:, col].T).abs().sum(dim=1)
        value = values[part] + 0.0  # turns -0 into +0: an exact sum of 0 has no sign
        bound = size * factors.unit
        settled, is_open = _enclosed(round_once(value - bound, dtype), round_once(value + bound, dtype), dtype)
        merged[row, col] = settled
        again = (is_open & value.isfinite()).nonzero().view(-1)
        if again.numel():
            row, col, weight = row[again], col[again], weight[again]
            high, low, bound = factors.compensated(weight, row + first_row, col, size[again])
            settled, is_open = _enclosed(
                round_pair(high, low - bound, dtype), round_pair(high, low + bound, dtype), dtype
            )
            merged[row, col] = settled
            for k in is_open.nonzero().view(-1).tolist():
                exact = factors.exact(float(weight[k]), int(row[k]) + first_row, int(col[k]))
                merged[row[k], col[k]] = round_fraction(exact, dtype)
                facts.n_exact += 1
        facts.max_abs = max(facts.max_abs, _max_abs(settled))


def _enclosed(lowest: Tensor, highest: Tensor, dtype: DType) -> tuple[Tensor, Tensor]:
    """Rounded ends of an interval: the result where they agree to the bit, and where they do not."""
    return lowest, lowest.view(BITS[dtype]) != highest.view(BITS[dtype])


def _refuse_non_finite(
    name: str, weights: Tensor, merged: Tensor, facts: BlockFacts, first_row: int, dtype: DType
) -> None:
    if facts.max_abs <= largest(dtype):
        return
    bad = (~torch.isfinite(merged)).nonzero()
    if not bad.numel():  # a zero's lower neighbour is no number; it only looked like one that overflows
        facts.max_abs = _max_abs(merged)
        return
    row, col = (int(index) for index in bad[0])
    before = float(weights[row, col])
    where = f"{name}: element [{first_row + row}, {col}]"
    if not torch.isfinite(weights[row, col]):
        raise NonFiniteTensorError(f"{where} of the base is {before}, expected a finite number")
    raise NonFiniteTensorError(
        f"{where}: merged value exceeds {dtype.long_name}'s largest {largest(dtype):g} (base {before:g})",
        hint="--dtype base" if dtype is DType.F16 else None,
    )


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Give sum and rest: a + b = sum + rest, exactly (Knuth)."""
    total = a + b
    shift = total - a
    return total, (a - (total - shift)) + (b - shift)


def _two_product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Give product and rest: a * b = product + rest, exactly while nothing over- or underflows (Dekker)."""
    product = a * b
    (a_high, a_low), (b_high, b_low) = _split(a), _split(b)
    return product, a_low * b_low - (((product - a_high * b_high) - a_low * b_high) - a_high * b_low)


def _split(a: Tensor) -> tuple[Tensor, Tensor]:
    shifted = a * 134217729.0  # 2^27 + 1
    high = shifted - (shifted - a)
    return high, a - high


def _max_abs(values: Tensor) -> float:
    biggest = float(values.abs().max()) if values.numel() else 0.0
    return biggest if math.isfinite(biggest) else math.inf


def _from_bits(bits: int, bits_type: torch.dtype, target: torch.dtype) -> float:
    value = float(torch.tensor([bits], dtype=bits_type).view(target)[0])
    return value if math.isfinite(value) else math.inf


def _bits_above(threshold: float, bits_type: torch.dtype, target: torch.dtype) -> int:
    """Bits of a value of the target format that is not below the threshold."""
    return int(torch.tensor([threshold], dtype=torch.float64).to(target).view(bits_type)[0]) + 1
