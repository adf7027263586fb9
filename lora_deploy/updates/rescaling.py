"""Rows or columns multiplied by trained numbers (IA3): W' = l ⊙ W; or by 1 plus them (LyCORIS): the reader adds the 1.

Definition: one product an element in float64, which is exact for factors of 24 bits or fewer, and one rounding.
Source: IA3, arXiv:2205.05638; peft 0.21.2, ``tuners/ia3/layer.py``; LyCORIS 4.1.3, ``modules/ia3.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch

from lora_deploy.updates.interface import Update, refuse_weight

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rescaling(Update):
    """Multiplies each row or column of the weight."""

    kind: ClassVar[str] = "rescaling"

    factors: Tensor
    """(n_rows,) or (n_cols,), any floating dtype."""
    axis: Literal["rows", "columns"]
    n_other: int
    """Size of the other axis."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the region."""
        sides = (len(self.factors), self.n_other)
        return sides if self.axis == "rows" else sides[::-1]

    @property
    def n_bytes(self) -> int:
        """Memory of the factors in bytes."""
        return self.factors.nbytes

    def transposed(self) -> Self:
        """Multiply along the other axis."""
        return replace(self, axis="columns" if self.axis == "rows" else "rows")

    def weighted(self, weight: float) -> Self:
        """A product cannot be weighted."""
        return refuse_weight(self, weight)

    def block(self, weight_rows: Tensor, rows: slice, state: object) -> Tensor:
        """Multiply in float64."""
        del state
        factors = self.factors.to(torch.float64)
        return weight_rows * (factors[rows, None] if self.axis == "rows" else factors[None, :])
