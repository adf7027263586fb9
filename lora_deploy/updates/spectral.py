"""Differences given by a few Fourier coefficients (FourierFT): Δ = Re(F⁻¹(S)), S zero but for n entries.

Rows of Δ are formed on their own: the inverse transform along the columns of S has n terms only, that along its rows is
a fast one. Nothing of the region's size is held.

Definition: T[m, v] = Σ_f s_f·exp(2πi·(u_f·m mod M) / M) / M over the entries f of column v, in their order, then the
inverse fast Fourier transform of T's rows, in complex float64; the real part counts.
Source: FourierFT, arXiv:2405.03003, equations 2 to 4; peft 0.21.2, ``tuners/fourierft/layer.py``, ``get_delta_weight``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

import torch

from lora_deploy.updates.additive import Additive

if TYPE_CHECKING:
    from torch import Tensor

_ELEMENTS_AT_ONCE = 1 << 16
"""Part of the definition, as blocks are."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Spectral(Additive):
    """Adds the real part of an inverse two-dimensional Fourier transform."""

    kind: ClassVar[str] = "spectral"

    rows_of: Tensor
    """(n,) int64: u."""
    columns_of: Tensor
    """(n,) int64: v; no two entries have both u and v in common."""
    coefficients: Tensor
    """(n,): s, any floating dtype."""
    n_rows: int
    """M."""
    n_cols: int
    """N."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the region."""
        return self.n_rows, self.n_cols

    @property
    def n_bytes(self) -> int:
        """Memory of coefficients and places in bytes."""
        return self.rows_of.nbytes + self.columns_of.nbytes + self.coefficients.nbytes

    def transposed(self) -> Self:
        """The transform of a transpose is the transpose of the transform."""
        return replace(self, rows_of=self.columns_of, columns_of=self.rows_of, n_rows=self.n_cols, n_cols=self.n_rows)

    def delta(self, rows: slice, state: object) -> Tensor:
        """Transform the rows' part."""
        del state
        start, stop, _ = rows.indices(self.n_rows)
        step = max(1, _ELEMENTS_AT_ONCE // max(self.n_cols, len(self.coefficients)))
        parts = [self._transformed(first, min(first + step, stop)) for first in range(start, stop, step)]
        return torch.cat(parts) if parts else torch.empty((0, self.n_cols), dtype=torch.float64)

    def _transformed(self, start: int, stop: int) -> Tensor:
        n_rows, n_cols = self.shape
        turns = (torch.arange(start, stop)[:, None] * self.rows_of[None, :]) % n_rows
        angles = turns.to(torch.float64) * (2 * math.pi / n_rows)
        terms = torch.polar(torch.ones_like(angles), angles) * (self.coefficients.to(torch.float64) / n_rows)
        columns = torch.zeros((stop - start, n_cols), dtype=torch.complex128)
        columns.index_add_(1, self.columns_of, terms)
        transformed: Tensor = torch.fft.ifft(columns, dim=1)
        return transformed.real
