"""The orders of rounding in which peers merge, and whether one of them explains a stored tensor.

The definition rounds once. Peers load the base in a working dtype, round the factors, the product, the delta, the
sum, and the sum again when it is stored. An ``Order`` names what is rounded to what; these are those of peft 0.21.2
(``tuners/lora/layer.py`` and ``dora.py``: autocast or not, ``safe_merge`` or not, CPU or GPU), of mergekit 0.1.5,
which loads in any dtype, calls peft and casts again (``common.py:ModelReference.merged``, ``io/tasks.py``), of
Unsloth (float32 sum), and of those that scale one factor first (torchtune, mlx-lm).

Tolerance. A tensor is explained when *one* order holds for all of its elements: each is the definition's own value,
or lies in the enclosure of what that order gives. Rounding is monotone, so the enclosure is the ends rounded step by
step; its width comes only from what float32 arithmetic may lose in a product of rank r (r + 4 units of float32),
which nearly always rounds away: one value, or two neighbours where it does not. Factorisations (PiSSA, OLoRA, KaSA),
which peers do in float32, may differ by 2^-14 of the weight's root mean square.

Why this hides nothing. An element that was left at the base's value passes only where an order that explains all the
other elements gives just that value there: then no byte could tell. A tensor of which that is true throughout is not
passed but called inconclusive.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from lora_deploy.checkpoint import Checkpoint
from lora_deploy.evidence.enclosure import Enclosure
from lora_deploy.merge.plan import PlannedTensor
from lora_deploy.merge.shard import base_rows, regions
from lora_deploy.rounding import dtype_of, round_once, torch_dtype
from lora_deploy.tensors import DType, Region
from lora_deploy.updates.addition import Addition
from lora_deploy.updates.dora import Dora
from lora_deploy.updates.interface import Update
from lora_deploy.updates.low_rank import LowRank
from lora_deploy.updates.replacement import Replacement
from lora_deploy.updates.residual import Component, WithoutComponent
from lora_deploy.updates.token_rows import TokenRows

_UNIT = 2.0**-24
_FACTORISATION = 2.0**-14
_TINY = 2.0**-149
_STRADDLING = 2.0**-4
"""Part of the elements of a row, at most, whose rounding an enclosure leaves open."""
_SAMPLE = 1 << 12
_POINTS_AT_ONCE = 1 << 15
_ELEMENTS_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What is rounded to what, on the way from base and factors to the stored tensor."""

    work: DType
    """Dtype of the model while it is merged."""
    factors: DType | None = None
    """Dtype that A and B are rounded to; None: as the adapter stores them."""
    product: DType = DType.F32
    """Dtype of B·A and of s·(B·A)."""
    delta: tuple[DType, ...] = ()
    """Dtypes that s·B·A is rounded to before it is added."""
    scales_up_first: bool = False
    """(s·B)·A instead of s·(B·A)."""
    n_passes: int = 1
    """How often a part of the delta is added and rounded: 2 where peft adds it twice (attention's ``out_proj``)."""

    def __str__(self) -> str:
        parts = [f"weights in {self.work.long_name}"]
        if self.factors:
            parts.append(f"factors rounded to {self.factors.long_name}")
        if self.product is not DType.F32:
            parts.append(f"product in {self.product.long_name}")
        if self.scales_up_first:
            parts.append("B scaled first")
        parts += [f"delta rounded to {dtype.long_name}" for dtype in self.delta]
        if self.n_passes > 1:
            parts.append(f"delta added in {self.n_passes} parts")
        return ", ".join(parts)


def known_orders(tensor: PlannedTensor) -> tuple[Order, ...]:
    """List the orders that may have made a tensor of this dtype from its base and updates, each once."""
    base = tensor.source.dtype if tensor.source is not None else tensor.spec.dtype
    if not base.is_floating or not tensor.spec.dtype.is_floating:
        return ()
    works = dict.fromkeys((base, tensor.spec.dtype, DType.F32, DType.BF16, DType.F16, DType.F64))
    if not tensor.updates:
        return tuple(Order(work=work) for work in works if not _holds(work, base))
    own = next((dtype for entry in tensor.updates for dtype in _factor_dtypes(entry.update)), DType.F32)
    n_passes = (1, 2) if tensor.spec.name.endswith("out_proj.weight") else (1,)
    orders = (order for n in n_passes for work in works for order in _orders_in(work, own, n))
    return tuple(dict.fromkeys(orders))


def _orders_in(work: DType, own: DType, n_passes: int) -> Iterator[Order]:
    """Combine what is rounded in one working dtype, leaving out what changes nothing."""
    rounded = None if _holds(work, own) else work
    combinations: tuple[tuple[DType | None, DType, tuple[DType, ...], bool], ...] = (
        (None, DType.F32, (), False),  # peft with autocast, unsafe; Unsloth; any float32 sum
        (None, DType.F32, (work,), False),  # peft with autocast, safe_merge; embeddings; fused experts
        (rounded, DType.F32, (work,), False),  # peft without autocast, on a CPU
        (rounded, work, (work,), False),  # the same on a GPU
        (None, DType.F32, (own,), False),  # peft without autocast, low_cpu_mem_usage
        (None, DType.F32, (own, work), False),
        (None, own, (own,), False),
        (None, own, (own, work), False),
        (None, own, (own, work), True),  # mlx-lm
        (rounded, work, (work,), True),  # torchtune
    )
    for factors, product, delta, scales_up_first in combinations:
        kept = tuple(dict.fromkeys(dtype for dtype in delta if not _holds(dtype, DType.F32)))
        is_low = not _holds(product, DType.F32)
        yield Order(
            work=work,
            factors=factors,
            product=product if is_low else DType.F32,
            delta=kept,
            scales_up_first=scales_up_first and is_low,
            n_passes=n_passes,
        )


_PRECISION = {DType.F64: (53, 1022), DType.F32: (24, 126), DType.F16: (11, 14), DType.BF16: (8, 126)}


def _holds(wide: DType, narrow: DType) -> bool:
    """Whether every value of one format is a value of the other."""
    return all(a >= b for a, b in zip(_PRECISION[wide], _PRECISION[narrow], strict=True))


def _factor_dtypes(update: object) -> Iterator[DType]:
    if isinstance(update, LowRank):
        yield dtype_of(update.down)
    elif isinstance(update, WithoutComponent):
        yield from _factor_dtypes(update.low_rank)
    elif isinstance(update, Dora):
        yield from _factor_dtypes(update.inner)
    elif isinstance(update, Addition):
        yield dtype_of(update.values)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Points:
    """Some elements of a region."""

    rows: Tensor
    cols: Tensor
    """(n,) int64, both within the region."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Taken:
    """What an update takes out of the weights first."""

    component: Component
    error: float
    """How far a peer's float32 factorisation may be from it, at any element."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Misses:
    """Elements that an order of rounding does not explain."""

    n_elements: int = 0
    first: int | None = None
    """Flat position of the first."""

    def __add__(self, other: Misses) -> Misses:
        known = [first for first in (self.first, other.first) if first is not None]
        return Misses(n_elements=self.n_elements + other.n_elements, first=min(known, default=None))


_Multiply: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Products of rows (n, r) with columns (m, r): of each row with its own column, or of every row with every column."""


def _pairwise(rows: Tensor, cols: Tensor) -> Tensor:
    return (rows * cols).sum(dim=1)


def _outer(rows: Tensor, cols: Tensor) -> Tensor:
    return rows @ cols.T


class Replayer:
    """Computes elements of one planned tensor in a given order of rounding; called from any thread."""

    def __init__(self, tensor: PlannedTensor, base: Checkpoint) -> None:
        self.tensor = tensor
        self.base = base
        self.regions = regions(tensor)
        self._lock = threading.Lock()
        self._components: dict[tuple[int, Region, DType], _Taken] = {}
        self._norms_of: dict[tuple[int, Region, Order], Enclosure] = {}

    def misses(self, orders: Sequence[Order], positions: Tensor, values: Tensor, most: int) -> dict[Order, Misses]:
        """Count the stored values that orders do not explain; counting stops beyond ``most``.

        Shapes: positions (n,) int64, flat, all of one region or of none; values (n,) float64.
        """
        return {order: self._misses(order, positions, values, most) for order in orders}

    def _misses(self, order: Order, positions: Tensor, values: Tensor, most: int) -> Misses:
        found = Misses()
        sizes = [min(_SAMPLE, len(positions))]  # a wrong order shows at once
        while (rest := len(positions) - sum(sizes)) > 0:
            sizes.append(min(_POINTS_AT_ONCE, rest))
        for at, stored in zip(positions.split(sizes), values.split(sizes), strict=True):
            missed = at[~self.enclose(order, at).contains(stored)]
            if len(missed):
                found += Misses(n_elements=len(missed), first=int(missed[0]))
            if found.n_elements > most:
                break
        return found

    def enclose(self, order: Order, positions: Tensor) -> Enclosure:
        """Enclose what the order gives at flat positions, all of one region or of none."""
        weights = self._weights(positions)
        result = Enclosure.exactly(weights).rounded(order.work)
        region, updates = self._region_of(int(positions[0]))
        within = positions - region.offset
        points = _Points(rows=within // region.n_cols, cols=within % region.n_cols)
        for index, update in enumerate(updates):
            result = self._applied(update, index, region, order, points, result)
        return result.rounded(self.tensor.spec.dtype)

    def _weights(self, positions: Tensor) -> Tensor:
        source = self.tensor.source
        if source is None or source.n_elements != self.tensor.spec.n_elements:
            return torch.zeros(len(positions), dtype=torch.float64)
        flat = torch.frombuffer(self.base.read(source.name), dtype=torch_dtype(source.dtype))
        return flat[positions].to(torch.float64)

    def _region_of(self, position: int) -> tuple[Region, Sequence[Update]]:
        for region, updates in self.regions:
            if region.offset <= position < region.stop:
                return region, updates
        return Region(offset=0, n_rows=1, n_cols=self.tensor.spec.n_elements), ()

    def _applied(
        self, update: Update, index: int, region: Region, order: Order, points: _Points, before: Enclosure
    ) -> Enclosure:
        if isinstance(update, Replacement):
            values = update.values.reshape(update.shape)[points.rows, points.cols].to(torch.float64)
            return Enclosure.exactly(values).rounded(order.work)
        if isinstance(update, TokenRows):
            return _with_rows(update, points, before, order)
        if isinstance(update, Addition):
            values = update.values.reshape(update.shape)[points.rows, points.cols].to(torch.float64)
            return _added(before, _scaled(Enclosure.exactly(values), update.scale.value, order), order)
        if isinstance(update, LowRank):
            return _added(before, _delta(update, order, points), order)
        if isinstance(update, WithoutComponent):
            taken = self._component(update, index, region, order.work)
            before = _without(before, taken, points, order)
            return _added(before, _delta(update.low_rank, order, points), order)
        assert isinstance(update, Dora)  # noqa: S101 - KINDS has no other; a test compares
        return self._renormed(update, index, region, order, points, before)

    def _component(self, update: WithoutComponent, index: int, region: Region, work: DType) -> _Taken:
        """Compute once what an update takes out of the region's weights in their working dtype."""
        with self._lock:
            if (index, region, work) not in self._components:
                weight = self._region_weights(region, slice(0, region.n_rows), work)
                error = _FACTORISATION * float(weight.square().mean().sqrt())
                self._components[index, region, work] = _Taken(component=update.component(weight), error=error)
            return self._components[index, region, work]

    def _renormed(
        self, update: Dora, index: int, region: Region, order: Order, points: _Points, before: Enclosure
    ) -> Enclosure:
        """DoRA as peft computes it: sum and norm in the wider of model and delta, magnitude over norm, product."""
        taken = None
        inner = update.inner
        if isinstance(inner, WithoutComponent):
            taken = self._component(inner, index, region, order.work)
            before, inner = _without(before, taken, points, order), inner.low_rank
        dtype = _sum_dtype(order)
        direction = (before + _delta(inner, order, points)).rounded(dtype)
        norms = self._norms(update, inner, index, region, order, taken)
        at = points.rows if update.axis == "rows" else points.cols
        magnitude = Enclosure.exactly(update.magnitude[at].to(torch.float64))
        if order.factors is not None:
            magnitude = magnitude.rounded(order.factors)
        factor = (magnitude / Enclosure(norms.low[at], norms.high[at])).rounded(dtype)
        return (factor * direction).rounded(dtype).rounded(order.work)

    def _norms(
        self, update: Dora, inner: LowRank, index: int, region: Region, order: Order, taken: _Taken | None
    ) -> Enclosure:
        """Enclose the norms of all rows or columns: one pass over the region, once for each order."""
        with self._lock:
            if (index, region, order) not in self._norms_of:
                self._norms_of[index, region, order] = self._summed_norms(update, inner, region, order, taken)
            return self._norms_of[index, region, order]

    def _summed_norms(
        self, update: Dora, inner: LowRank, region: Region, order: Order, taken: _Taken | None
    ) -> Enclosure:
        by_rows = update.axis == "rows"
        squares = torch.zeros(region.n_rows if by_rows else region.n_cols, dtype=torch.float64)
        dtype = _sum_dtype(order)
        step = max(1, _ELEMENTS_AT_ONCE // max(1, region.n_cols))
        for start in range(0, region.n_rows, step):
            rows = slice(start, min(start + step, region.n_rows))
            weights = self._region_weights(region, rows, order.work)
            if taken is not None:
                weights = round_once(weights - taken.component.left[rows] @ taken.component.right, order.work)
            delta = _product(inner, order, inner.up[rows], inner.down.T, _outer).low
            square = round_once(weights.to(torch.float64) + delta, dtype).to(torch.float64).square_()
            if by_rows:
                squares[rows] = square.sum(dim=1)
            else:
                squares += square.sum(dim=0)
        norms = Enclosure.exactly(squares.sqrt_())
        return norms.widened_by(64 * _UNIT + _STRADDLING * _unit_of(dtype)).rounded(dtype)

    def _region_weights(self, region: Region, rows: slice, work: DType) -> Tensor:
        """Rows of the region, rounded to the working dtype, in float64."""
        assert self.tensor.source is not None  # noqa: S101 - binding refuses these kinds without a base tensor
        weights = base_rows(self.base, self.tensor.source, region, rows).to(torch.float64)
        return round_once(weights, work).to(torch.float64)


def _delta(update: LowRank, order: Order, points: _Points) -> Enclosure:
    """Enclose s·B·A at some elements, in one part of the order's passes."""
    return _product(update, order, update.up[points.rows], update.down[:, points.cols].T, _pairwise)


def _product(update: LowRank, order: Order, rows: Tensor, cols: Tensor, multiply: _Multiply) -> Enclosure:
    """Enclose s·B·A of some rows of B and some columns of A."""
    scale = update.scale.value / order.n_passes
    ups, downs = rows.to(torch.float64), cols.to(torch.float64)
    if order.factors is not None:
        ups, downs = (round_once(t, order.factors).to(torch.float64) for t in (ups, downs))
    if order.scales_up_first:
        ups, scale = round_once(ups * scale, order.product).to(torch.float64), 1.0
    size = multiply(ups.abs(), downs.abs())
    product = Enclosure.exactly(multiply(ups, downs)).widened(size * ((update.rank + 4) * _UNIT) + _TINY)
    return _scaled(product.rounded(order.product) if order.product is not DType.F32 else product, scale, order)


def _scaled(values: Enclosure, scale: float, order: Order) -> Enclosure:
    """Multiply by the scale in float32 and round to what the order rounds the delta to."""
    scaled = values
    if scale != 1:
        factor = Enclosure.exactly(torch.full_like(values.low, scale))
        scaled = (values * factor).widened_by(2 * _UNIT).widened(_TINY)
        if order.product is not DType.F32:
            scaled = scaled.rounded(order.product)
    for dtype in order.delta:
        scaled = scaled.rounded(dtype)
    return scaled


def _added(before: Enclosure, delta: Enclosure, order: Order) -> Enclosure:
    """Add the delta, once or in equal parts, rounding each sum to the working dtype."""
    result = before
    for _ in range(order.n_passes):
        total = result + delta
        result = (total if order.work is DType.F64 else total.rounded(DType.F32)).rounded(order.work)
    return result


def _without(before: Enclosure, taken: _Taken, points: _Points, order: Order) -> Enclosure:
    left, right = taken.component.left[points.rows], taken.component.right[:, points.cols].T
    component = Enclosure.exactly(_pairwise(left, right)).widened(taken.error)
    return (before - component).rounded(order.work)


def _with_rows(update: TokenRows, points: _Points, before: Enclosure, order: Order) -> Enclosure:
    """Put the trained rows in place of the others."""
    place = torch.full((update.shape[0],), -1, dtype=torch.int64)
    place[list(update.indices)] = torch.arange(len(update.indices))
    found = place[points.rows]
    values = update.values[found.clamp(min=0), points.cols].to(torch.float64)
    trained = Enclosure.exactly(values).rounded(order.work)
    return trained.where(found >= 0, before)


def _sum_dtype(order: Order) -> DType:
    """The wider of model and delta: what peft adds, and takes norms, in."""
    delta = order.delta[-1] if order.delta else DType.F32
    return order.work if _holds(order.work, delta) else delta if _holds(delta, order.work) else DType.F32


def _unit_of(dtype: DType) -> float:
    return 2.0 ** -_PRECISION[dtype][0]
