"""Updates that add a dense difference: W' = W + s·d, for the bias that PEFT trains beside the factors.

Evaluated in float64 and rounded once. Source: peft 0.21.2, ``tuners/lora/layer.py``, ``Linear.merge`` (lora_bias).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

import torch

from lora_deploy.updates.interface import Scale
from lora_deploy.updates.whole import WholeUpdate

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Addition(WholeUpdate):
    """Adds ``scale * values`` to a tensor of the same shape."""

    kind: ClassVar[str] = "addition"

    scale: Scale

    def weighted(self, weight: float) -> Self:
        """Multiply the scale, exactly."""
        return replace(self, scale=self.scale.times(weight))

    def block(self, weight_rows: Tensor, rows: slice, state: object) -> Tensor:
        """Add in float64."""
        del state
        return weight_rows + self.scale.value * self.values.reshape(self.shape)[rows].to(torch.float64)
