"""Plain low-rank updates: W' = W + s·up·down, the definition of the merge.

Source: LoRA, arXiv:2106.09685, section 4.1; rank-stabilised scale arXiv:2312.03732.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

import torch

from lora_deploy.updates.interface import Scale, Update

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LowRank(Update):
    """Adds ``scale * up @ down`` to a region; convolution kernels are flattened behind the input axis."""

    is_exact: ClassVar[bool] = True
    kind: ClassVar[str] = "low-rank"

    down: Tensor
    """(r, n_cols), any floating dtype, as stored in the adapter."""
    up: Tensor
    """(n_rows, r), any floating dtype, as stored in the adapter."""
    scale: Scale

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the region."""
        return self.up.shape[0], self.down.shape[1]

    @property
    def rank(self) -> int:
        """Inner dimension r of the product."""
        return int(self.up.shape[1])

    @property
    def n_bytes(self) -> int:
        """Memory of both factors in bytes."""
        return self.down.nbytes + self.up.nbytes

    @property
    def n_elements(self) -> int:
        """Elements of both factors."""
        return self.down.numel() + self.up.numel()

    def transposed(self) -> Self:
        """(up·down)^T = down^T·up^T."""
        return replace(self, down=self.up.T, up=self.down.T)

    def weighted(self, weight: float) -> Self:
        """Multiply the scale, exactly."""
        return replace(self, scale=self.scale.times(weight))

    def rows(self, rows: slice | Tensor) -> Self:
        """Restrict to some rows of the region, or take them in another order (int64 indices)."""
        return replace(self, up=self.up[rows])

    def delta(self, rows: slice = slice(None)) -> Tensor:
        """Rows of s·up·down in float64, shape (n, n_cols): for norms and reports, not for merged bytes."""
        return (self.up[rows].to(torch.float64) * self.scale.value) @ self.down.to(torch.float64)

    def block(self, weight_rows: Tensor, rows: slice, state: object) -> Tensor:
        """Add in float64; the merge itself evaluates low-rank sums exactly instead (``merge/exact``)."""
        del state
        return weight_rows + self.delta(rows)
