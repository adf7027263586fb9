"""Updates that put trained rows in place of some rows of an embedding.

Source: peft 0.21.2, ``tuners/trainable_tokens`` and ``LoraConfig.trainable_token_indices``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import torch

from lora_deploy.errors import UnmergeableAdapterError
from lora_deploy.updates.interface import Update, refuse_weight

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenRows(Update):
    """Replaces some rows of an embedding: W[indices[k]] = values[k]."""

    is_exact: ClassVar[bool] = True
    kind: ClassVar[str] = "token-rows"

    indices: tuple[int, ...]
    """Token ids, in the order of ``values``; distinct."""
    values: Tensor
    """(n, dim): final values, not differences."""
    n_rows: int | None = None
    """Rows of the embedding; ``bind`` fills it in from the base."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the embedding; before binding, the rows that the largest index needs."""
        return self.n_rows or max(self.indices, default=-1) + 1, self.values.shape[1]

    @property
    def n_bytes(self) -> int:
        """Memory of the values in bytes."""
        return self.values.nbytes

    def transposed(self) -> Self:
        """Rows of an embedding are rows wherever it is stored."""
        message = "token rows have no transposed form"
        raise UnmergeableAdapterError(message)

    def weighted(self, weight: float) -> Self:
        """A replacement cannot be weighted."""
        return refuse_weight(self, weight)

    def block(self, weight_rows: Tensor, rows: slice, state: object) -> Tensor:
        """Copy the block and put the trained rows that fall into it."""
        del state
        start = rows.start or 0
        result = weight_rows.clone()
        for k, index in enumerate(self.indices):
            if start <= index < start + len(result):
                result[index - start] = self.values[k].to(torch.float64)
        return result
