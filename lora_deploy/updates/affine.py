"""Weights multiplied and shifted element by element (PEFT's GLoRA): W' = W + s·(W ⊙ A + B), A and B of low rank.

Definition: both matrices in float64, row block by row block.
Source: GLoRA, arXiv:2306.07967; peft 0.21.2, ``tuners/glora/layer.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar, Self

from lora_deploy.updates.hadamard import Pair
from lora_deploy.updates.interface import Scale, Update

if TYPE_CHECKING:
    from torch import Tensor

UNSCALED = Scale(factor=Fraction(1), source="1: the method has no scale")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Affine(Update):
    """Adds ``scale * (W ⊙ factor + shift)``."""

    kind: ClassVar[str] = "affine"

    factor: Pair
    """A; a matrix of zeros is a pair of rank 0."""
    shift: Pair
    """B, of the same shape."""
    scale: Scale = UNSCALED

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the region."""
        return self.factor.shape

    @property
    def n_bytes(self) -> int:
        """Memory of all factors in bytes."""
        return self.factor.n_bytes + self.shift.n_bytes

    def transposed(self) -> Self:
        """Multiply and shift the transpose."""
        return replace(self, factor=self.factor.transposed(), shift=self.shift.transposed())

    def weighted(self, weight: float) -> Self:
        """Multiply the scale, exactly."""
        return replace(self, scale=self.scale.times(weight))

    def block(self, weight_rows: Tensor, rows: slice, state: object) -> Tensor:
        """Multiply and add in float64."""
        del state
        return weight_rows + self.scale.value * (weight_rows * self.factor.rows(rows) + self.shift.rows(rows))
