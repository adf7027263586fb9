"""Differences of a few elements: W'[i, j] = W[i, j] + s·Σ v_k over the entries k of (i, j), in their order.

Source: SHiRA, arXiv:2406.13175; Super-Tuning, arXiv:2607.09287; WaveFT, arXiv:2505.12532; peft 0.21.2,
``tuners/shira/layer.py``, ``tuners/supertuning/layer.py`` and ``tuners/waveft/layer.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import torch

from lora_deploy.updates.additive import Additive
from lora_deploy.updates.interface import Scale

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sparse(Additive):
    """Adds values at some places; build it with ``at``."""

    kind: ClassVar[str] = "sparse"

    positions: Tensor
    """(n,) int64: row-major places, ascending; those of one place in the order in which they are added."""
    values: Tensor
    """(n,): v, any floating dtype."""
    n_rows: int
    n_cols: int

    @classmethod
    def at(cls, row: Tensor, column: Tensor, values: Tensor, shape: tuple[int, int], scale: Scale) -> Self:
        """Sort entries by place; ``row`` and ``column`` are (n,) integers within ``shape``."""
        places = row.to(torch.int64) * shape[1] + column.to(torch.int64)
        order = torch.argsort(places, stable=True)
        return cls(positions=places[order], values=values[order], n_rows=shape[0], n_cols=shape[1], scale=scale)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the region."""
        return self.n_rows, self.n_cols

    @property
    def n_bytes(self) -> int:
        """Memory of places and values in bytes."""
        return self.positions.nbytes + self.values.nbytes

    def transposed(self) -> Self:
        """Swap rows and columns of every place."""
        row, column = self.positions // self.n_cols, self.positions % self.n_cols
        return type(self).at(column, row, self.values, (self.n_cols, self.n_rows), self.scale)

    def delta(self, rows: slice, state: object) -> Tensor:
        """Add the rows' entries to zeros."""
        del state
        n_cols = self.n_cols
        start, stop, _ = rows.indices(self.n_rows)
        bounds = torch.tensor([start * n_cols, stop * n_cols])
        first, last = torch.searchsorted(self.positions, bounds).tolist()
        result = torch.zeros((stop - start) * n_cols, dtype=torch.float64)
        result.index_add_(0, self.positions[first:last] - start * n_cols, self.values[first:last].to(torch.float64))
        return result.view(stop - start, n_cols)
