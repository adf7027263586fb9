"""Weights multiplied element by element with 1 plus a low-rank matrix (HiRA): W' = W ⊙ (1 + B·A).

Definition: the product in float64, row block by row block.
Source: HiRA, ICLR 2025; peft 0.21.2, ``tuners/hira/layer.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from lora_deploy.updates.hadamard import Pair
from lora_deploy.updates.interface import Update, refuse_weight

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Modulation(Update):
    """Multiplies every element of the weight."""

    kind: ClassVar[str] = "modulation"

    pair: Pair

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the region."""
        return self.pair.shape

    @property
    def n_bytes(self) -> int:
        """Memory of both factors in bytes."""
        return self.pair.n_bytes

    def transposed(self) -> Self:
        """Modulate the transpose."""
        return replace(self, pair=self.pair.transposed())

    def weighted(self, weight: float) -> Self:
        """What depends on the weight cannot be weighted."""
        return refuse_weight(self, weight)

    def block(self, weight_rows: Tensor, rows: slice, state: object) -> Tensor:
        """Multiply in float64."""
        del state
        return weight_rows * (1 + self.pair.rows(rows))
