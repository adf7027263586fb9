"""Kronecker products (LoKr): W' = W + s·(C ⊗ D).

A convolution's D keeps its kernel behind its columns, flattened as the weight's is: ``⊗`` acts on the first two axes.
Definition: every element is one product in float64, times the scale.
Source: LyCORIS, arXiv:2309.14859; peft 0.21.2, ``tuners/lokr/layer.py``; LyCORIS 4.1.3, ``modules/lokr.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

import torch

from lora_deploy.errors import UnmergeableAdapterError
from lora_deploy.updates.additive import Additive

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Kronecker(Additive):
    """Adds a Kronecker product of two matrices."""

    kind: ClassVar[str] = "kronecker"

    left: Tensor
    """(a, b), any floating dtype: C."""
    right: Tensor
    """(c, d·k), any floating dtype: D; the product is (a·c, b·d·k)."""
    span: tuple[int, int] | None = None
    """Rows of the product that the region has; None is all."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the region."""
        n_rows = self.left.shape[0] * self.right.shape[0]
        start, stop = self.span or (0, n_rows)
        return stop - start, self.left.shape[1] * self.right.shape[1]

    @property
    def n_bytes(self) -> int:
        """Memory of both matrices in bytes."""
        return self.left.nbytes + self.right.nbytes

    def transposed(self) -> Self:
        """(C ⊗ D)^T = C^T ⊗ D^T.

        Raises:
            UnmergeableAdapterError: It is only some rows of the product.
        """
        if self.span is not None:
            raise UnmergeableAdapterError(f"a {self.kind} update that was cut is one of a layer stored as (out, in)")
        return replace(self, left=self.left.T, right=self.right.T)

    def rows(self, rows: slice) -> Self:
        """Restrict to some rows of the region."""
        start, stop, _ = rows.indices(self.shape[0])
        first = self.span[0] if self.span else 0
        return replace(self, span=(first + start, first + stop))

    def delta(self, rows: slice, state: object) -> Tensor:
        """Form rows of the product: row i is row i // c of C times row i % c of D."""
        del state
        start, stop, _ = rows.indices(self.shape[0])
        row = torch.arange(start, stop) + (self.span[0] if self.span else 0)
        height = self.right.shape[0]
        left = self.left[row // height].to(torch.float64)
        right = self.right[row % height].to(torch.float64)
        return (left[:, :, None] * right[:, None, :]).flatten(1)
