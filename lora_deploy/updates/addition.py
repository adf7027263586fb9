"""Updates that add a dense difference: W' = W + s·d, for the bias that PEFT trains beside the factors.

Evaluated in float64 and rounded once. Source: peft 0.21.2, ``tuners/lora/layer.py``, ``Linear.merge`` (lora_bias).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

import torch

from lora_deploy.updates.interface import Scale, Update

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Addition(Update):
    """Adds ``scale * values`` to a tensor of the same shape."""

    kind: ClassVar[str] = "addition"

    values: Tensor
    """The difference in the tensor's own shape, any floating dtype, as stored in the adapter."""
    scale: Scale

    @property
    def shape(self) -> tuple[int, int]:
        """First axis by the product of the others."""
        shape = self.values.shape
        return (shape[0], self.values[0].numel() if shape[0] else 0) if shape else (1, 1)

    @property
    def n_bytes(self) -> int:
        """Memory of the values in bytes."""
        return self.values.nbytes

    def transposed(self) -> Self:
        """Swap the two axes of a matrix."""
        return replace(self, values=self.values.T)

    def weighted(self, weight: float) -> Self:
        """Multiply the scale, exactly."""
        return replace(self, scale=self.scale.times(weight))

    def block(self, weight_rows: Tensor, rows: slice, state: object) -> Tensor:
        """Add in float64."""
        del state
        return weight_rows + self.scale.value * self.values.reshape(self.shape)[rows].to(torch.float64)
