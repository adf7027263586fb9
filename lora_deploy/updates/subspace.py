"""Updates that take a subspace out of the weight and may put trained rows there (DEFT, PaRa): W' = W + Q·(c·R − P⁺·W).

Q (out, r) spans what is changed. With ``relu`` Q is the trained P and P⁺ = relu(P)^T, with ``qr`` Q has the orthonormal
columns of P's QR factorisation and P⁺ = Q^T. PaRa has no R.

Definition: Q and P⁺·W in float64, the latter summed over fixed blocks of rows; then one product a block. Where the
layer is stored as (in, out), W^T's rows need no such sum. The peer computes both in float32.
Source: DEFT (peft 0.21.2, ``tuners/deft/layer.py``, ``get_delta_weight``); PaRa, arXiv:2406.05641.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch

from lora_deploy.updates.interface import ReadRows, Scale, Update, refuse_weight
from lora_deploy.updates.reduction import row_blocks

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Prepared:
    span: Tensor
    """(out, r) float64: Q."""
    change: Tensor | None
    """(r, in) float64: c·R − P⁺·W; None where the weight is stored as (in, out)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Subspace(Update):
    """Replaces what the weight has in a subspace of its outputs."""

    kind: ClassVar[str] = "subspace"

    directions: Tensor
    """(out, r): P, any floating dtype."""
    method: Literal["relu", "qr"]
    injected: Tensor | None
    """(r, in): R, any floating dtype; None only takes out."""
    scale: Scale
    """c, which multiplies R alone."""
    n_in: int
    is_turned: bool = False
    """Whether the region is (in, out)."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the region."""
        sides = (int(self.directions.shape[0]), self.n_in)
        return sides[::-1] if self.is_turned else sides

    @property
    def n_bytes(self) -> int:
        """Memory of P and R in bytes."""
        return self.directions.nbytes + (0 if self.injected is None else self.injected.nbytes)

    @property
    def n_prepared_bytes(self) -> int:
        """Q, P⁺, the sum and R in float64."""
        rank = int(self.directions.shape[1])
        return 8 * rank * (4 * int(self.directions.shape[0]) + 4 * self.n_in)

    def transposed(self) -> Self:
        """The same change of a weight that is stored the other way round."""
        return replace(self, is_turned=not self.is_turned)

    def weighted(self, weight: float) -> Self:
        """What is taken out cannot be weighted."""
        return refuse_weight(self, weight)

    def prepare(self, read: ReadRows) -> _Prepared:
        """Form Q and, over fixed blocks of rows, P⁺·W."""
        span, taken = self._factors()
        if self.is_turned:
            return _Prepared(span=span, change=None)
        change = torch.zeros((span.shape[1], self.n_in), dtype=torch.float64)
        for rows in row_blocks(len(span)):
            change -= taken[rows].T @ read(rows)
        if self.injected is not None:
            change += self.scale.value * self.injected.to(torch.float64)
        return _Prepared(span=span, change=change)

    def block(self, weight_rows: Tensor, rows: slice, state: object) -> Tensor:
        """Add the rows' part of the change."""
        assert isinstance(state, _Prepared)  # noqa: S101 - what prepare gave
        if state.change is not None:
            return weight_rows + state.span[rows] @ state.change
        change = -(weight_rows @ self._taken(state.span))
        if self.injected is not None:
            change += self.scale.value * self.injected[:, rows].T.to(torch.float64)
        return weight_rows + change @ state.span.T

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Q and P⁺ transposed, (out, r) each."""
        directions = self.directions.to(torch.float64)
        span = torch.linalg.qr(directions).Q if self.method == "qr" else directions
        return span, self._taken(span)

    def _taken(self, span: Tensor) -> Tensor:
        return span if self.method == "qr" else torch.relu(span)
