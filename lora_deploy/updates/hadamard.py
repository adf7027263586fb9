"""Elementwise products of two low-rank differences (LoHa): W' = W + s·(B₁·A₁) ⊙ (B₂·A₂).

A convolution is flattened behind its input axis; a core tensor (CP, Tucker) is folded into A by the reader.
Definition: both products in float64, row block by row block.
Source: FedPara, arXiv:2108.06098; peft 0.21.2, ``tuners/loha/layer.py``; LyCORIS 4.1.3, ``modules/loha.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

import torch

from lora_deploy.updates.additive import Additive

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pair:
    """Two factors of a product."""

    up: Tensor
    """(n_rows, r), any floating dtype."""
    down: Tensor
    """(r, n_cols), any floating dtype."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the product."""
        return self.up.shape[0], self.down.shape[1]

    @property
    def n_bytes(self) -> int:
        """Memory in bytes."""
        return self.up.nbytes + self.down.nbytes

    def transposed(self) -> Pair:
        """(B·A)^T = A^T·B^T."""
        return Pair(up=self.down.T, down=self.up.T)

    def cut(self, rows: slice | Tensor) -> Pair:
        """The factors of some rows of the product."""
        return replace(self, up=self.up[rows])

    def rows(self, rows: slice) -> Tensor:
        """Compute rows of the product: (n, n_cols) float64."""
        return self.up[rows].to(torch.float64) @ self.down.to(torch.float64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Hadamard(Additive):
    """Adds the elementwise product of two products."""

    kind: ClassVar[str] = "hadamard"

    first: Pair
    second: Pair
    """Of the same shape."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the region."""
        return self.first.shape

    @property
    def n_bytes(self) -> int:
        """Memory of all factors in bytes."""
        return self.first.n_bytes + self.second.n_bytes

    def transposed(self) -> Self:
        """The transpose of an elementwise product is that of its factors."""
        return replace(self, first=self.first.transposed(), second=self.second.transposed())

    def rows(self, rows: slice | Tensor) -> Self:
        """Restrict to some rows of the region, or take them in another order (int64 indices)."""
        return replace(self, first=self.first.cut(rows), second=self.second.cut(rows))

    def delta(self, rows: slice, state: object) -> Tensor:
        """Multiply the rows of both products."""
        del state
        return self.first.rows(rows).mul_(self.second.rows(rows))
