"""Weights whose inputs are mixed by a low-rank map, plus a low-rank product (GLoRA): W' = W + s·(W·P·Q + B·A).

P·Q acts on input channels: on a convolution's kernel position by position.
Definition: all products in float64, row block by row block.
Source: GLoRA, arXiv:2306.07967; LyCORIS 4.1.3, ``modules/glora.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

import torch

from lora_deploy.errors import UnmergeableAdapterError
from lora_deploy.updates.hadamard import Pair
from lora_deploy.updates.interface import Scale, Update

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MixedInputs(Update):
    """Adds ``scale * (W·mix + product)``."""

    kind: ClassVar[str] = "mixed-inputs"

    mix: Pair
    """P (in, r) and Q (r, in)."""
    product: Pair
    """B (out, r) and A (r, in·k)."""
    scale: Scale

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the region."""
        return self.product.shape

    @property
    def n_bytes(self) -> int:
        """Memory of all factors in bytes."""
        return self.mix.n_bytes + self.product.n_bytes

    def transposed(self) -> Self:
        """Layers that store (in, out) are not adapted like this.

        Raises:
            UnmergeableAdapterError: Always.
        """
        raise UnmergeableAdapterError(f"a {self.kind} update is one of a layer that is stored as (out, in)")

    def weighted(self, weight: float) -> Self:
        """Multiply the scale, exactly."""
        return replace(self, scale=self.scale.times(weight))

    def block(self, weight_rows: Tensor, rows: slice, state: object) -> Tensor:
        """Mix the inputs of some rows, and add their product."""
        del state
        n_inputs = self.mix.shape[0]
        by_position = weight_rows.reshape(len(weight_rows), n_inputs, -1).transpose(1, 2)
        left, right = (factor.to(torch.float64) for factor in (self.mix.up, self.mix.down))
        mixed = (by_position @ left @ right).transpose(1, 2).reshape(weight_rows.shape)
        return weight_rows + self.scale.value * (mixed + self.product.rows(rows))
