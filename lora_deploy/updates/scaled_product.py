"""Low-rank products with trained vectors on all sides: W' = W + s·diag(a)·B·diag(d)·A·diag(c).

B and A may be views of matrices that all layers of a model share, as VeRA's are: nothing of their size is kept for a
layer, the scaled A is formed for the region at work and dropped after it.

Definition: A is converted to float64, multiplied by d along its rows, then by c along its columns; B's rows are
converted, the product is one float64 matrix product, and its rows are multiplied by a.
Source: VeRA, arXiv:2310.11454, equation 2; DeLoRA, arXiv:2503.18225, equation 6; peft 0.21.2, ``tuners/vera/layer.py``,
``tuners/pvera/layer.py`` and ``tuners/delora/layer.py``, ``get_delta_weight``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

import torch

from lora_deploy.updates.additive import Additive
from lora_deploy.updates.interface import ReadRows

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScaledProduct(Additive):
    """Adds a product of two factors whose rows, inner axis and columns are scaled by vectors."""

    kind: ClassVar[str] = "scaled-product"

    up: Tensor
    """(n_rows, r), any floating dtype; may be a view of a matrix that layers share."""
    down: Tensor
    """(r, n_cols), any floating dtype; may be a view of a matrix that layers share."""
    inner: Tensor
    """(r,): d, any floating dtype."""
    row: Tensor | None = None
    """(n_rows,): a; None is all ones."""
    column: Tensor | None = None
    """(n_cols,): c; None is all ones."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the region."""
        return self.up.shape[0], self.down.shape[1]

    @property
    def n_bytes(self) -> int:
        """Memory of the vectors and of both factors in bytes, shared or not."""
        vectors = (self.inner, self.row, self.column)
        return self.up.nbytes + self.down.nbytes + sum(vector.nbytes for vector in vectors if vector is not None)

    @property
    def n_prepared_bytes(self) -> int:
        """The scaled A, and a copy on the way to it."""
        return 2 * 8 * self.down.numel()

    def transposed(self) -> Self:
        """(diag(a)·B·diag(d)·A·diag(c))^T swaps the factors and the outer vectors."""
        return replace(self, up=self.down.T, down=self.up.T, row=self.column, column=self.row)

    def prepare(self, read: ReadRows) -> Tensor:
        """Form the scaled A: (r, n_cols) float64."""
        del read
        right = self.down.to(torch.float64) * self.inner.to(torch.float64)[:, None]
        return right if self.column is None else right.mul_(self.column.to(torch.float64))

    def delta(self, rows: slice, state: object) -> Tensor:
        """Form rows of the product."""
        assert isinstance(state, torch.Tensor)  # noqa: S101 - what prepare gave
        product = self.up[rows].to(torch.float64) @ state
        return product if self.row is None else product.mul_(self.row[rows].to(torch.float64)[:, None])
