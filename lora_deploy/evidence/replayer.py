"""Compute elements of a planned tensor in a given order of rounding, and count those that it does not explain.

Promise: only the elements asked for are computed; what an update needs of the whole tensor (norms, factorisations) is
computed once for each order, in blocks of bounded size where it can be.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_deploy.checkpoint import Checkpoint
from lora_deploy.evidence.defined import Defined, define
from lora_deploy.evidence.enclosure import Enclosure
from lora_deploy.evidence.orders import Order, unit_of
from lora_deploy.evidence.steps import (
    Points,
    Taken,
    added,
    bias_delta_at,
    delta_at,
    delta_rows,
    rounded_delta,
    with_rows,
    without,
)
from lora_deploy.merge.plan import PlannedTensor
from lora_deploy.merge.shard import base_rows, regions
from lora_deploy.rounding import round_once, torch_dtype
from lora_deploy.tensors import DType, Region
from lora_deploy.updates.addition import Addition
from lora_deploy.updates.additive import Additive
from lora_deploy.updates.dora import Dora
from lora_deploy.updates.interface import Update
from lora_deploy.updates.low_rank import LowRank
from lora_deploy.updates.replacement import Replacement
from lora_deploy.updates.residual import WithoutComponent
from lora_deploy.updates.token_rows import TokenRows

_FACTORISATION = 2.0**-14
"""How far a peer's factorisation in float32 may be off, relative to the weight's root mean square."""
_ACCUMULATED = 64 * unit_of(DType.F32)
"""How far a peer's norm in float32 may be off, relative."""
_STRADDLING = 2.0**-4
"""Part of the elements of a row, at most, whose rounding an enclosure leaves open."""
_SAMPLE = 1 << 12
_POINTS_AT_ONCE = 1 << 15
_ELEMENTS_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Misses:
    """Elements that an order of rounding does not explain."""

    n_elements: int = 0
    first: int | None = None
    """Flat position of the first."""

    def __add__(self, other: Misses) -> Misses:
        known = [first for first in (self.first, other.first) if first is not None]
        return Misses(n_elements=self.n_elements + other.n_elements, first=min(known, default=None))


class Replayer:
    """Computes elements of one planned tensor in a given order of rounding; called from any thread."""

    def __init__(self, tensor: PlannedTensor, base: Checkpoint) -> None:
        self.tensor = tensor
        self.base = base
        self.regions = regions(tensor)
        self._lock = threading.Lock()
        self._components: dict[tuple[int, Region, DType], Taken] = {}
        self._definitions: dict[tuple[int, Region, DType], Defined] = {}
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
        points = Points(rows=within // region.n_cols, cols=within % region.n_cols)
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
        self, update: Update, index: int, region: Region, order: Order, points: Points, before: Enclosure
    ) -> Enclosure:
        if isinstance(update, Replacement):
            values = update.values.reshape(update.shape)[points.rows, points.cols].to(torch.float64)
            return Enclosure.exactly(values).rounded(order.work)
        if isinstance(update, TokenRows):
            return with_rows(update, points, before, order)
        if isinstance(update, Dora) and update.n_joint == 1 and not isinstance(update.inner, Additive):
            return self._renormed(update, index, region, order, points, before)
        if isinstance(update, WithoutComponent):
            taken = self._component(update, index, region, order.work)
            before = without(before, taken, points, order)
            delta = delta_at(update.low_rank, order, points)
        elif isinstance(update, Addition):
            delta = bias_delta_at(update, order, points)
        elif isinstance(update, LowRank):
            delta = delta_at(update, order, points)
        else:
            delta = self._defined(update, index, region, order.work).delta_at(points)
        return added(before, delta, order)

    def _component(self, update: WithoutComponent, index: int, region: Region, work: DType) -> Taken:
        """Compute once what an update takes out of the region's weights in their working dtype."""
        with self._lock:
            if (index, region, work) not in self._components:
                weight = self._region_weights(region, slice(0, region.n_rows), work)
                error = _FACTORISATION * float(weight.square().mean().sqrt())
                self._components[index, region, work] = Taken(component=update.component(weight), error=error)
            return self._components[index, region, work]

    def _defined(self, update: Update, index: int, region: Region, work: DType) -> Defined:
        """Prepare once a kind that is evaluated as it is defined, on weights in their working dtype."""
        with self._lock:
            if (index, region, work) not in self._definitions:

                def read(rows: slice) -> Tensor:
                    start, stop, _ = rows.indices(region.n_rows)
                    return self._region_weights(region, slice(start, stop), work)

                self._definitions[index, region, work] = define(update, read)
            return self._definitions[index, region, work]

    def _renormed(
        self, update: Dora, index: int, region: Region, order: Order, points: Points, before: Enclosure
    ) -> Enclosure:
        """DoRA as peft computes it: sum and norm in the wider of model and delta, magnitude over norm, product."""
        taken = None
        inner = update.inner
        assert not isinstance(inner, Additive)  # noqa: S101 - those are evaluated as they are defined
        if isinstance(inner, WithoutComponent):
            taken = self._component(inner, index, region, order.work)
            before, inner = without(before, taken, points, order), inner.low_rank
        dtype = order.sum_dtype
        direction = (before + rounded_delta(delta_at(inner, order, points), order.passes[0])).rounded(dtype)
        norms = self._norms(update, inner, index, region, order, taken)
        at = points.rows if update.axis == "rows" else points.cols
        magnitude = Enclosure.exactly(update.magnitude[at].to(torch.float64))
        if order.factors is not None:
            magnitude = magnitude.rounded(order.factors)
        factor = (magnitude / Enclosure(norms.low[at], norms.high[at])).rounded(dtype)
        return (factor * direction).rounded(dtype).rounded(order.work)

    def _norms(
        self, update: Dora, inner: LowRank, index: int, region: Region, order: Order, taken: Taken | None
    ) -> Enclosure:
        """Enclose the norms of all rows or columns: one pass over the region, once for each order."""
        with self._lock:
            if (index, region, order) not in self._norms_of:
                self._norms_of[index, region, order] = self._summed_norms(update, inner, region, order, taken)
            return self._norms_of[index, region, order]

    def _summed_norms(
        self, update: Dora, inner: LowRank, region: Region, order: Order, taken: Taken | None
    ) -> Enclosure:
        by_rows = update.axis == "rows"
        squares = torch.zeros(region.n_rows if by_rows else region.n_cols, dtype=torch.float64)
        dtype = order.sum_dtype
        step = max(1, _ELEMENTS_AT_ONCE // max(1, region.n_cols))
        for start in range(0, region.n_rows, step):
            rows = slice(start, min(start + step, region.n_rows))
            weights = self._region_weights(region, rows, order.work)
            if taken is not None:
                weights = round_once(weights - taken.component.left[rows] @ taken.component.right, order.work)
            delta = rounded_delta(delta_rows(inner, order, rows), order.passes[0]).low
            square = round_once(weights.to(torch.float64) + delta, dtype).to(torch.float64).square_()
            if by_rows:
                squares[rows] = square.sum(dim=1)
            else:
                squares += square.sum(dim=0)
        norms = Enclosure.exactly(squares.sqrt_())
        return norms.widened_by(_ACCUMULATED + _STRADDLING * unit_of(dtype)).rounded(dtype)

    def _region_weights(self, region: Region, rows: slice, work: DType) -> Tensor:
        """Rows of the region, rounded to the working dtype, in float64."""
        assert self.tensor.source is not None  # noqa: S101 - binding refuses these kinds without a base tensor
        weights = base_rows(self.base, self.tensor.source, region, rows).to(torch.float64)
        return round_once(weights, work).to(torch.float64)
