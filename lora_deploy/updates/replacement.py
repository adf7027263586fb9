"""Updates that put the adapter's own values in place of the base's: trained heads, biases, whole embeddings.

Source: peft 0.21.2, ``utils/save_and_load.py`` (modules_to_save, bias).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

import torch

from lora_deploy.updates.interface import Update, refuse_weight

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Replacement(Update):
    """Replaces a whole tensor; its shape may differ from the base's, and the base may lack the tensor."""

    is_exact: ClassVar[bool] = True
    kind: ClassVar[str] = "replacement"

    values: Tensor
    """The new tensor in its own shape, any floating or integer dtype, as stored in the adapter."""

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
        """A replacement cannot be weighted."""
        return refuse_weight(self, weight)

    def block(self, weight_rows: Tensor, rows: slice, state: object) -> Tensor:
        """Give the new rows, whatever the old ones were."""
        del weight_rows, state
        return self.values.reshape(self.shape)[rows].to(torch.float64)
