"""Full-rank sums of shared bases (RandLoRA): Δ = U·V, V[j·n + b] = λ[j, b]·A[j]·γ[b], U[:, b·r + j] = B[:, b, j].

The two factors name their r·n common columns in different orders; that is what training multiplied. V has the size of
the smaller side squared: it is formed once for a region, in float64, and dropped after it.

Definition: V = (λ·A)·γ element by element, then one float64 matrix product for each block of rows.
Source: RandLoRA, arXiv:2502.00987; peft 0.21.2, ``tuners/randlora/layer.py``, ``get_scaled_bases``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

import torch

from lora_deploy.updates.additive import Additive
from lora_deploy.updates.interface import ReadRows

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Prepared:
    right: Tensor
    """(r·n, short) float64: V."""
    left: Tensor | None
    """(long, r·n) float64: U."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RandomBases(Additive):
    """Adds U·V, or its transpose where the layer has more inputs than outputs."""

    kind: ClassVar[str] = "random-bases"

    shared_up: Tensor
    """(long, n, r): B, a view of what all layers share."""
    shared_down: Tensor
    """(r, short): A, a view of what all layers share."""
    sizes: Tensor
    """(r, n): λ."""
    widths: Tensor
    """(n, short): γ."""
    is_turned: bool
    """Whether the region is (short, long)."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the region."""
        sides = (self.shared_up.shape[0], self.shared_down.shape[1])
        return sides[::-1] if self.is_turned else sides

    @property
    def n_bytes(self) -> int:
        """Memory of λ, γ and both bases in bytes, which are shared."""
        return sum(t.nbytes for t in (self.sizes, self.widths, self.shared_up, self.shared_down))

    @property
    def n_prepared_bytes(self) -> int:
        """V, a copy on the way to it, and U where each row of the region needs all of it."""
        n_long, n_short = self.shared_up.shape[0], self.shared_down.shape[1]
        return 8 * self.sizes.numel() * (2 * n_short + (n_long if self.is_turned else 0))

    def transposed(self) -> Self:
        """(U·V)^T."""
        return replace(self, is_turned=not self.is_turned)

    def prepare(self, read: ReadRows) -> _Prepared:
        """Form V and, where each row of the region needs all of it, U."""
        del read
        scaled = self.sizes.to(torch.float64)[:, :, None] * self.shared_down.to(torch.float64)[:, None, :]
        right = scaled.mul_(self.widths.to(torch.float64)).flatten(0, 1)
        return _Prepared(right=right, left=self._left(slice(None)) if self.is_turned else None)

    def delta(self, rows: slice, state: object) -> Tensor:
        """Multiply the rows' part of one factor by the other."""
        assert isinstance(state, _Prepared)  # noqa: S101 - what prepare gave
        if state.left is not None:
            return state.right[:, rows].T @ state.left.T
        return self._left(rows) @ state.right

    def _left(self, rows: slice) -> Tensor:
        return self.shared_up[rows].flatten(1).to(torch.float64)
