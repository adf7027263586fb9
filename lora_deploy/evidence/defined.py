"""What kinds without an order of rounding of their own add to the weight, and how far a peer may be from it.

Such kinds are transforms, factorisations, networks of the weight and products of formed factors. A peer computes their
difference in float32 in ways that are not modelled step by step: it may be off by 2^-14 of the difference's root mean
square, as for factorisations. An element that was left at the base's value passes only where its own difference is
smaller than that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_deploy.evidence.enclosure import Enclosure
from lora_deploy.evidence.steps import Points
from lora_deploy.updates.interface import Update

_FLOAT32 = 2.0**-14
_ELEMENTS_AT_ONCE = 1 << 20

ReadWeights = Callable[[slice], Tensor]
"""Gives rows of the region, rounded to the working dtype, in float64."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Defined:
    """An update prepared on one region's weights."""

    update: Update
    read: ReadWeights
    state: object
    error: float
    """How far a peer's difference may be off, at any element."""

    def delta_at(self, points: Points) -> Enclosure:
        """Enclose what the update adds at some elements; only the rows between the first and the last are computed."""
        first, last = int(points.rows.min()), int(points.rows.max()) + 1
        result = torch.empty(len(points.rows), dtype=torch.float64)
        for rows, delta in _deltas(self.update, self.read, self.state, first, last):
            chosen = (points.rows >= rows.start) & (points.rows < rows.stop)
            result[chosen] = delta[points.rows[chosen] - rows.start, points.cols[chosen]]
        return Enclosure.exactly(result).widened(self.error)


def define(update: Update, read: ReadWeights) -> Defined:
    """Prepare an update, and measure its difference in one pass over the region."""
    state = update.prepare(read)
    n_rows, n_cols = update.shape
    square = sum(float(delta.square().sum()) for _, delta in _deltas(update, read, state, 0, n_rows))
    error = _FLOAT32 * (square / max(1, n_rows * n_cols)) ** 0.5
    return Defined(update=update, read=read, state=state, error=error)


def _deltas(update: Update, read: ReadWeights, state: object, first: int, last: int) -> Iterator[tuple[slice, Tensor]]:
    step = max(1, _ELEMENTS_AT_ONCE // max(1, update.shape[1]))
    for start in range(first, last, step):
        rows = slice(start, min(start + step, last))
        weights = read(rows)
        yield rows, update.block(weights, rows, state) - weights
