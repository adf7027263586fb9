"""What kinds have in common that add s·Δ to the weight, with a Δ that the weight takes no part in.

Promise: linear in the adapter, so that adapters can be weighted and their order does not matter beyond rounding.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from lora_deploy.updates.interface import Scale, Update

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Additive(Update):
    """Adds ``scale * delta`` in float64."""

    scale: Scale

    @abstractmethod
    def delta(self, rows: slice, state: object) -> Tensor:
        """Compute rows of Δ, without the scale: (n, n_cols) float64; ``state`` is what ``prepare`` gave."""

    def weighted(self, weight: float) -> Self:
        """Multiply the scale, exactly."""
        return replace(self, scale=self.scale.times(weight))

    def block(self, weight_rows: Tensor, rows: slice, state: object) -> Tensor:
        """Add in float64."""
        return weight_rows + self.scale.value * self.delta(rows, state)
