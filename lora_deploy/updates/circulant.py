"""Block-circulant differences (C3A): Δ's block (p, q) has the entries w[p, q, (c − a) mod b] in its row a and column c.

Definition: entries are taken from the kernel, in float64, multiplied by the scale; no transform is needed.
Source: C3A, arXiv:2407.19342; peft 0.21.2, ``tuners/c3a/utils.py``, ``get_circulant_fast``, which goes through a
float32 Fourier transform.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

import torch

from lora_deploy.updates.additive import Additive

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Circulant(Additive):
    """Adds a matrix of circulant blocks."""

    kind: ClassVar[str] = "circulant"

    kernel: Tensor
    """(n_rows / b, n_cols / b, b): the first row of every block."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the region."""
        n_down, n_across, size = self.kernel.shape
        return n_down * size, n_across * size

    @property
    def n_bytes(self) -> int:
        """Memory of the kernel in bytes."""
        return self.kernel.nbytes

    def transposed(self) -> Self:
        """The transpose of a circulant block is the circulant of its first column."""
        first_columns = torch.roll(self.kernel.flip(-1), 1, dims=-1)
        return replace(self, kernel=first_columns.transpose(0, 1).contiguous())

    def delta(self, rows: slice, state: object) -> Tensor:
        """Take the rows' entries from the kernel."""
        del state
        start, stop, _ = rows.indices(self.shape[0])
        size = self.kernel.shape[2]
        row = torch.arange(start, stop)
        shifts = (torch.arange(size)[None, :] - row[:, None]) % size
        of_rows = self.kernel[row // size]
        entries = of_rows.gather(2, shifts[:, None, :].expand_as(of_rows))
        return entries.flatten(1).to(torch.float64)
