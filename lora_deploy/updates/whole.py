"""What kinds have in common whose values have the changed tensor's own shape."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from lora_deploy.updates.interface import Update

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WholeUpdate(Update):
    """A change with a value for every element."""

    values: Tensor
    """In the tensor's own shape, any dtype, as stored in the adapter."""

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
