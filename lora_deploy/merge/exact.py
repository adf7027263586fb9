"""Where a weight meets its low-rank updates: RN(W + Σ s·up·down), the exact real value rounded once.

Promise (laws 1 and 2): the bytes do not depend on BLAS, tile, thread or device. Every element is evaluated in float64
with a proven error bound; where the bound leaves the rounding open, the element is computed again, at last as an exact
rational.

How it stays fast. A tile of float64 values v fits the L2 cache. Level 1 rounds, for every element, two values that
enclose everything v could be; where they agree, as they do for all but about 1 in 14,000 (bfloat16), 2,000 (float16)
or 5,000 (float32), that is the result. Level 2 takes the open elements of all tiles together, with a bound for each.
What it leaves, mostly true ties, goes to level 3, error-free transformations, unless it is little; what even that
leaves goes to level 4, ``fractions``.

The error bound. Each product s·up·down carries two roundings and the sum of R of them and W at most R + 1, in any
order, with or without fused operations; so |v - exact| <= (R + 8)·2^-53·(|W| + Σ|s·up|·|down|), to first order and
with room for the rest (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from lora_deploy.errors import NonFiniteTensorError
from lora_deploy.merge.compiled import merge_in_one_pass
from lora_deploy.merge.factors import UNIT, Factors
from lora_deploy.merge.workspace import Workspace
from lora_deploy.rounding import BITS, largest, round_fraction, round_once, round_pair, torch_dtype
from lora_deploy.tensors import DType, Place

TILE_COLS = 4096
_ABOVE, _BELOW = 1 + 2.0**-23, 1 - 2.0**-23
"""Times a normal float32, rounded: one or two units in the last place further from zero, or nearer to it."""
_STILL_NORMAL = 2.0**-120
"""Values down to here move when they are multiplied by those."""
_UNDERFLOWING = 2.0**-140
"""Larger than the smallest float32 number."""
_GATHERED = 1 << 17
"""Factor elements that levels 2 and 3 gather at a time."""
_FEW = 8
"""So many elements are settled faster by rational arithmetic than by the small tensor operations of level 3."""


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
    """Elements that only exact rational arithmetic settled."""

    def add(self, other: BlockFacts) -> None:
        """Take in the facts of another block of the same tensor."""
        self.n_elements += other.n_elements
        self.max_abs = max(self.max_abs, other.max_abs)
        self.weight_square += other.weight_square
        self.delta_square += other.delta_square
        self.error_square += other.error_square
        self.n_underflowed += other.n_underflowed
        self.n_exact += other.n_exact


def merge_rows(
    place: Place, weights: Tensor, factors: Factors, rows: slice, dtype: DType, workspace: Workspace
) -> tuple[Tensor, BlockFacts]:
    """Merge some rows of a region; ``place`` is the whole region's.

    Shapes: weights (n, n_cols) in the base's dtype: rows ``rows`` of the region; the result (n, n_cols) in ``dtype``.

    Raises:
        NonFiniteTensorError: A weight or a factor is not finite, or a merged value exceeds the output dtype's range.
    """
    if not factors.is_finite:
        raise NonFiniteTensorError(f"{place.name}: the update's factors or its scale are not finite numbers")
    merged = torch.empty(weights.shape, dtype=torch_dtype(dtype), device=workspace.device)
    facts = BlockFacts(n_elements=merged.numel())
    if merged.numel():
        block = _Block(weights=weights, factors=factors, first_row=rows.start or 0, merged=merged, dtype=dtype)
        is_done = workspace.is_compiled and _merge_compiled(block, facts)
        for flat, values in () if is_done else _merge_tiles(block, workspace, facts):
            _settle(block, flat, values, facts)
        if dtype in {DType.F32, DType.F64}:
            facts.max_abs = _max_abs(merged)
        if not facts.max_abs <= largest(dtype):
            _refuse(place, block)
    return merged, facts


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Block:
    """Some rows of a region, before and after."""

    weights: Tensor
    factors: Factors
    first_row: int
    """Row of the region that the block begins with."""
    merged: Tensor
    dtype: DType


def _merge_compiled(block: _Block, facts: BlockFacts) -> bool:
    """Levels 1 and 2 in one pass over memory, then what it leaves; false where that cannot be, with nothing counted."""
    rows = slice(block.first_row, block.first_row + len(block.weights))
    found = merge_in_one_pass(block.weights, block.merged, block.factors, rows)
    if found is None:
        return False
    facts.weight_square += found.weight_square
    facts.error_square += found.error_square
    facts.max_abs = max(facts.max_abs, _size(found.max_bits, block.merged.dtype))
    facts.n_underflowed += found.n_underflowed
    if len(found.positions):
        _settle(block, found.positions, found.values, facts)
    return True


def _merge_tiles(block: _Block, workspace: Workspace, facts: BlockFacts) -> Iterator[tuple[Tensor, Tensor]]:
    """Level 1: write every tile's rounded values; give flat positions and float64 values of what is still open.

    Little is given once, at the end; much as soon as it is as much as a tile, so that memory stays bounded.
    """
    n_rows, n_cols = block.weights.shape
    factors = block.factors
    positions: list[Tensor] = []
    open_values: list[Tensor] = []
    tile_cols = min(n_cols, TILE_COLS)
    tile_rows = max(1, workspace.tile_elements // tile_cols)
    for top in range(0, n_rows, tile_rows):
        band = slice(top, min(top + tile_rows, n_rows))
        region_rows = slice(block.first_row + band.start, block.first_row + band.stop)
        left, reach = factors.left[region_rows], float(factors.row_reach[region_rows].max())
        parts = (matrix.split(tile_cols, dim=1) for matrix in (block.weights[band], block.merged[band], factors.right))
        for k, (weights, merged, right) in enumerate(zip(*parts, strict=True)):
            values = workspace.take("values", torch.float64, *weights.shape)
            values.copy_(weights)
            flat = values.view(-1)
            square = float(torch.dot(flat, flat))
            facts.weight_square += square
            values.addmm_(left, right)
            if not factors.is_plain or block.dtype is DType.F64:
                found = torch.arange(flat.numel(), device=flat.device)
            elif block.dtype is DType.F32:
                error = factors.unit * (math.sqrt(square) + reach)
                found = _round_to_single(values, merged, error, workspace, facts)
            else:
                found = _round_to_half(values, merged, factors.unit * reach, workspace, facts)
            if found.numel():
                open_values.append(flat[found])
                width = weights.shape[1]
                rest_of_rows = found // width * (n_cols - width) if width < n_cols else 0
                positions.append(found + rest_of_rows + (top * n_cols + k * tile_cols))
                if sum(map(len, positions)) >= workspace.tile_elements:
                    yield torch.cat(positions), torch.cat(open_values)
                    positions, open_values = [], []
    if positions:
        yield torch.cat(positions), torch.cat(open_values)


def _round_to_single(values: Tensor, merged: Tensor, error: float, workspace: Workspace, facts: BlockFacts) -> Tensor:
    """Level 1 for float32: write the rounded tile, give the flat positions that are still open.

    ``error`` bounds the float64 error of every element: by the Frobenius norm of the weights, which none exceeds. Zero
    stays open, and what may be stored as zero.
    """
    reach = max(1.001 * error, _UNDERFLOWING)
    low = workspace.take("low", torch.float32, *values.shape)
    high = workspace.take("high", torch.float32, *values.shape)
    wide = workspace.take("wide", torch.float64, *values.shape)
    high.copy_(torch.add(values, reach, out=wide))
    low.copy_(torch.sub(values, reach, out=wide))
    merged.copy_(low)
    _add_error_square(wide.copy_(low).sub_(values), facts)
    return _differing(high.view(torch.int32).bitwise_xor_(low.view(torch.int32)))


def _round_to_half(values: Tensor, merged: Tensor, error: float, workspace: Workspace, facts: BlockFacts) -> Tensor:
    """Level 1 for 16 bits: write the rounded tile, give the flat positions that are still open.

    The float32 numbers beside v enclose the exact value where half a unit of float32, at least 2^-25·|v|, exceeds its
    error, at most unit·|v| + 2·error, where ``error`` is unit·Σ|s·up|·|down|. What is too small for that stays open.
    """
    shape, target = values.shape, merged.dtype
    single = workspace.take("single", torch.float32, *shape)
    beside = workspace.take("beside", torch.float32, *shape)
    low = merged if merged.is_contiguous() else workspace.take("low", target, *shape)
    high = workspace.take("high", target, *shape)
    single.copy_(values)
    high.copy_(torch.mul(single, _ABOVE, out=beside))
    low.copy_(torch.mul(single, _BELOW, out=beside))
    if low is not merged:
        merged.copy_(low)
    wide = beside.copy_(low)
    low_bits, high_bits = low.view(torch.int16), high.view(torch.int16)
    found = _differing(high_bits.bitwise_xor_(low_bits))
    sizes = torch.bitwise_and(low_bits, 0x7FFF, out=high_bits)
    least, most = (_size(int(bits), target) for bits in torch.aminmax(sizes))
    too_small = max(5 * error * 2.0**25, _STILL_NORMAL)
    if most > too_small:  # else all are open
        facts.max_abs = max(facts.max_abs, most)
    if least <= too_small:
        found = torch.cat([found, (wide.abs().view(-1) <= too_small).nonzero().view(-1)]).unique()
    _add_error_square(wide.sub_(single), facts)
    return found


def _differing(differences: Tensor) -> Tensor:
    """Flat positions of the non-zero elements of a contiguous integer buffer, looked for eight bytes at a time."""
    flat = differences.view(-1)
    n_together = 8 // flat.element_size()
    n_whole = flat.numel() // n_together * n_together
    words = flat[:n_whole].view(torch.int64).nonzero()
    found = (words * n_together + torch.arange(n_together, device=flat.device)).view(-1)
    if n_whole < flat.numel():
        found = torch.cat([found, torch.arange(n_whole, flat.numel(), device=flat.device)])
    return found[flat[found] != 0]


def _add_error_square(errors: Tensor, facts: BlockFacts) -> None:
    flat = errors.view(-1)
    facts.error_square += float(torch.dot(flat, flat))


def _settle(block: _Block, flat: Tensor, values: Tensor, facts: BlockFacts) -> None:
    """Settle the open elements of a block in place: level 2, which leaves some for levels 3 and 4."""
    factors, dtype, n_cols = block.factors, block.dtype, block.weights.shape[1]
    for part in torch.arange(flat.numel(), device=flat.device).split(max(1, _GATHERED // max(1, factors.rank))):
        row, col = flat[part] // n_cols, flat[part] % n_cols
        weight = block.weights[row, col].to(torch.float64)
        value = values[part] + 0.0  # turns -0 into +0: an exact sum of 0 has no sign
        size = factors.size(weight, row + block.first_row, col)
        bound = size * factors.unit
        low, high = round_once(torch.stack([value - bound, value + bound]), dtype)
        is_open = weight.isfinite()
        if factors.is_plain:
            is_open &= low.view(BITS[dtype]) != high.view(BITS[dtype])
        facts.n_underflowed += int(((low == 0) & (value.abs() + bound != 0) & ~is_open).sum())
        again = is_open.nonzero().view(-1)
        if again.numel():
            low[again] = _settle_finely(block, weight[again], row[again], col[again], size[again], facts)
        block.merged[row, col] = low
        facts.max_abs = max(facts.max_abs, _max_abs(low))  # of 16 bits; level 1 saw those next to it towards zero


def _settle_finely(block: _Block, weight: Tensor, row: Tensor, col: Tensor, size: Tensor, facts: BlockFacts) -> Tensor:
    """Levels 3 and 4: give the rounded values of elements that level 2 left open."""
    factors, dtype = block.factors, block.dtype
    settled = torch.zeros_like(weight, dtype=torch_dtype(dtype))
    still_open = torch.ones_like(weight, dtype=torch.bool)
    if factors.is_plain and weight.numel() > _FEW:
        high, low, bound = factors.compensated(weight, row + block.first_row, col, size)
        settled, above = round_pair(torch.stack([high, high]), torch.stack([low - bound, low + bound]), dtype)
        # The pairs are true pairs only while the bound is below the last place of ``high``.
        still_open = (settled.view(BITS[dtype]) != above.view(BITS[dtype])) | ~(bound <= UNIT * high.abs())
        facts.n_underflowed += int(((settled == 0) & (high.abs() + bound != 0) & ~still_open).sum())
    for k in still_open.nonzero().view(-1).tolist():
        exact = factors.exact(float(weight[k]), int(row[k]) + block.first_row, int(col[k]))
        settled[k] = rounded = round_fraction(exact, dtype)
        facts.n_underflowed += bool(exact) and not rounded
        facts.n_exact += 1
    return settled


def _refuse(place: Place, block: _Block) -> None:
    """Say which weight is not finite or which merged value is too large, the first of them."""
    bad = (~block.weights.isfinite()).nonzero()
    if bad.numel():
        row, col = (int(index) for index in bad[0])
        raise NonFiniteTensorError(
            f"{place.element(block.first_row + row, col)} of the base is {float(block.weights[row, col])}, "
            "expected a finite number",
            hint="the base is damaged there; --exclude the tensor to merge the rest",
        )
    row, col = (int(index) for index in (~block.merged.isfinite()).nonzero()[0])
    exact = block.factors.exact(float(block.weights[row, col]), block.first_row + row, col)
    raise NonFiniteTensorError(
        f"{place.element(block.first_row + row, col)}: merged value {_in_digits(exact)} "
        f"exceeds {block.dtype.long_name}'s largest {largest(block.dtype):g}",
        hint="--dtype base" if block.dtype is DType.F16 else None,
    )


def _in_digits(exact: Fraction) -> str:
    try:
        return f"{float(exact):g}"
    except OverflowError:
        return "beyond float64"


def _max_abs(values: Tensor) -> float:
    biggest = float(values.abs().max()) if values.numel() else 0.0
    return biggest if math.isfinite(biggest) else math.inf


def _size(bits: int, target: torch.dtype) -> float:
    """The value of a positive 16-bit number, infinite when it is no number."""
    if target == torch.float16:
        (value,) = struct.unpack("<e", struct.pack("<H", bits))
    else:
        (value,) = struct.unpack("<f", struct.pack("<I", bits << 16))
    return float(value) if math.isfinite(value) else math.inf
