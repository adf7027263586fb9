"""The steps of an order of rounding, as enclosures of what they give: factors, product, scale, delta, sum.

Promise: whatever a peer's float32 or 16-bit arithmetic gives in that order, in any order of summation, is enclosed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from lora_deploy.evidence.enclosure import Enclosure
from lora_deploy.evidence.orders import Order, unit_of
from lora_deploy.rounding import round_once
from lora_deploy.tensors import DType
from lora_deploy.updates.addition import Addition
from lora_deploy.updates.low_rank import LowRank
from lora_deploy.updates.residual import Component
from lora_deploy.updates.token_rows import TokenRows

_UNIT = unit_of(DType.F32)
_FORMED = 64
"""Units of float32 that a peer may lose where it forms the factors themselves: readers form them in float64."""
_TINY = 2.0**-149
"""Smallest float32: what may be lost where products underflow."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Points:
    """Some elements of a region."""

    rows: Tensor
    cols: Tensor
    """(n,) int64, both within the region."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Taken:
    """What an update takes out of the weights first."""

    component: Component
    error: float
    """How far a peer's float32 factorisation may be from it, at any element."""


_Multiply: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Products of rows (n, r) with columns (m, r): of each row with its own column, or of every row with every column."""


def _pairwise(rows: Tensor, cols: Tensor) -> Tensor:
    return (rows * cols).sum(dim=1)


def _outer(rows: Tensor, cols: Tensor) -> Tensor:
    return rows @ cols.T


def delta_at(update: LowRank, order: Order, points: Points) -> Enclosure:
    """Enclose s·B·A at some elements, as one of the order's passes adds it."""
    return _product(update, order, update.up[points.rows], update.down[:, points.cols].T, _pairwise)


def delta_rows(update: LowRank, order: Order, rows: slice) -> Enclosure:
    """Enclose whole rows of s·B·A, as one of the order's passes adds it before rounding it."""
    return _product(update, order, update.up[rows], update.down.T, _outer)


def bias_delta_at(update: Addition, order: Order, points: Points) -> Enclosure:
    """Enclose s·d at some elements, as one of the order's passes adds it."""
    values = Enclosure.exactly(update.values.reshape(update.shape)[points.rows, points.cols].to(torch.float64))
    if order.factors is not None:
        values = values.rounded(order.factors)
    return _scaled(values, update.scale.value / len(order.passes), order)


def _product(update: LowRank, order: Order, rows: Tensor, cols: Tensor, multiply: _Multiply) -> Enclosure:
    """Enclose s·B·A of some rows of B and some columns of A."""
    scale = update.scale.value / len(order.passes)
    ups, downs = rows.to(torch.float64), cols.to(torch.float64)
    if order.factors is not None:
        ups, downs = (round_once(t, order.factors).to(torch.float64) for t in (ups, downs))
    error: Tensor | float = _TINY
    if order.scales_up_first:
        scaled, scale = _scaled(Enclosure.exactly(ups), scale, order), 1.0
        ups = (scaled.low + scaled.high) / 2
        error = error + multiply((scaled.high - scaled.low) / 2, downs.abs())
    size = multiply(ups.abs(), downs.abs())
    n_units = update.rank + 4 + (_FORMED if torch.float64 in {update.up.dtype, update.down.dtype} else 0)
    product = Enclosure.exactly(multiply(ups, downs)).widened(size * (n_units * _UNIT) + error)
    return _scaled(product.rounded(order.product) if order.product is not DType.F32 else product, scale, order)


def _scaled(values: Enclosure, scale: float, order: Order) -> Enclosure:
    """Multiply by the scale in float32, and round to the dtype of products."""
    if scale == 1:
        return values
    factor = Enclosure.exactly(torch.full_like(values.low, scale))
    scaled = (values * factor).widened_by(2 * _UNIT).widened(_TINY)
    return scaled if order.product is DType.F32 else scaled.rounded(order.product)


def rounded_delta(delta: Enclosure, dtypes: tuple[DType, ...]) -> Enclosure:
    """Round a delta to one dtype after the other."""
    for dtype in dtypes:
        delta = delta.rounded(dtype)
    return delta


def added(before: Enclosure, delta: Enclosure, order: Order) -> Enclosure:
    """Add the delta in the order's passes, rounding each sum to the working dtype."""
    result = before
    for dtypes in order.passes:
        total = result + rounded_delta(delta, dtypes)
        result = (total if order.work is DType.F64 else total.rounded(DType.F32)).rounded(order.work)
    return result


def without(before: Enclosure, taken: Taken, points: Points, order: Order) -> Enclosure:
    """Take the component out of the weights, rounding the rest to the working dtype."""
    left, right = taken.component.left[points.rows], taken.component.right[:, points.cols].T
    component = Enclosure.exactly(_pairwise(left, right)).widened(taken.error)
    return (before - component).rounded(order.work)


def with_rows(update: TokenRows, points: Points, before: Enclosure, order: Order) -> Enclosure:
    """Put the trained rows in place of the others."""
    place = torch.full((update.shape[0],), -1, dtype=torch.int64)
    place[list(update.indices)] = torch.arange(len(update.indices))
    found = place[points.rows]
    values = update.values[found.clamp(min=0), points.cols].to(torch.float64)
    trained = Enclosure.exactly(values).rounded(order.work)
    return trained.where(found >= 0, before)
