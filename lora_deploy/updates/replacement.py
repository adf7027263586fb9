"""Updates that put the adapter's own values in place of the base's: trained heads, biases, whole embeddings.

Source: peft 0.21.2, ``utils/save_and_load.py`` (modules_to_save, bias).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import torch

from lora_deploy.updates.interface import refuse_weight
from lora_deploy.updates.whole import WholeUpdate

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Replacement(WholeUpdate):
    """Replaces a whole tensor; its shape may differ from the base's, and the base may lack the tensor."""

    is_exact: ClassVar[bool] = True
    kind: ClassVar[str] = "replacement"

    def weighted(self, weight: float) -> Self:
        """A replacement cannot be weighted."""
        return refuse_weight(self, weight)

    def block(self, weight_rows: Tensor, rows: slice, state: object) -> Tensor:
        """Give the new rows, whatever the old ones were."""
        del weight_rows, state
        return self.values.reshape(self.shape)[rows].to(torch.float64)
