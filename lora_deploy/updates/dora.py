"""DoRA updates: the direction of W + delta, with a learned magnitude for each output: W' = m ⊙ V / ‖V‖, V = W + s·B·A.

The norm is taken over each row of a linear or convolution layer, and over each column of an embedding or of a layer
that is stored as (in, out), or over all columns of an input channel (LyCORIS). Column norms add squares in blocks of
1024 rows, in order, so that the sum does not depend on how the merge is cut.

Promise: with m = ‖V‖ the result is V. A norm of zero is an error, never a NaN.
Source: DoRA, arXiv:2402.09353, section 4; peft 0.21.2, ``tuners/lora/dora.py`` and ``variants.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch

from lora_deploy.errors import NonFiniteTensorError
from lora_deploy.updates.additive import Additive
from lora_deploy.updates.interface import ReadRows, Update, refuse_weight
from lora_deploy.updates.low_rank import LowRank
from lora_deploy.updates.reduction import REDUCED_ROWS, row_blocks
from lora_deploy.updates.residual import Residual

if TYPE_CHECKING:
    from torch import Tensor

NORM_BLOCK_ROWS = REDUCED_ROWS
"""Part of the definition: changing it changes bytes."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Prepared:
    inner: object
    """What the inner update prepared."""
    column_norms: Tensor | None
    """(n_cols / n_joint,) float64, or None where each row has its own norm."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Dora(Update):
    """Rescales each row or column of what an inner update gives to a learned length."""

    kind: ClassVar[str] = "dora"

    inner: LowRank | Residual | Additive
    """Gives V: the delta that is added before the norm is taken."""
    magnitude: Tensor
    """(n_rows,) or (n_cols / n_joint,), any floating dtype, as stored in the adapter."""
    axis: Literal["rows", "columns"]
    """What has a magnitude, in the layout of the stored tensor."""
    n_joint: int = 1
    """How many neighbouring columns share one: those of a kernel, where input channels have magnitudes."""

    @property
    def needs_whole(self) -> bool:
        """Column norms are added block by block: only a residual needs all rows at once."""
        return self.inner.needs_whole

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the region."""
        return self.inner.shape

    @property
    def n_bytes(self) -> int:
        """Memory of factors and magnitude in bytes."""
        return self.inner.n_bytes + self.magnitude.nbytes

    def transposed(self) -> Self:
        """Transpose the delta, and take norms over the other axis."""
        return replace(self, inner=self.inner.transposed(), axis="columns" if self.axis == "rows" else "rows")

    def weighted(self, weight: float) -> Self:
        """A normalised update cannot be weighted."""
        return refuse_weight(self, weight)

    def prepare(self, read: ReadRows) -> _Prepared:
        """Prepare the inner update and, where columns have magnitudes, take their norms.

        Raises:
            NonFiniteTensorError: A column of V has norm 0.
        """
        inner = self.inner.prepare(read)
        if self.axis == "rows":
            return _Prepared(inner=inner, column_norms=None)
        n_rows, n_cols = self.shape
        squares = torch.zeros(n_cols, dtype=torch.float64)
        for rows in row_blocks(n_rows, NORM_BLOCK_ROWS):
            squares += self.inner.block(read(rows), rows, inner).square_().sum(dim=0)
        if self.n_joint > 1:
            squares = squares.reshape(-1, self.n_joint).sum(dim=1)
        return _Prepared(inner=inner, column_norms=_nonzero(squares.sqrt_(), "column", 0))

    def block(self, weight_rows: Tensor, rows: slice, state: object) -> Tensor:
        """Rescale rows of V to the learned magnitude.

        Raises:
            NonFiniteTensorError: A row of V has norm 0.
        """
        assert isinstance(state, _Prepared)  # noqa: S101 - what prepare gave
        direction = self.inner.block(weight_rows, rows, state.inner)
        if state.column_norms is None:
            norms = _nonzero(torch.linalg.vector_norm(direction, dim=1), "row", rows.start or 0)
            return (self.magnitude[rows].to(torch.float64) / norms)[:, None] * direction
        factors = self.magnitude.to(torch.float64) / state.column_norms
        return factors.repeat_interleave(self.n_joint)[None, :] * direction


def _nonzero(norms: Tensor, axis: str, first: int) -> Tensor:
    zero = torch.nonzero(norms == 0)
    if len(zero):
        raise NonFiniteTensorError(
            f"{axis} {first + int(zero[0])} of W + delta has norm 0: DoRA divides by it",
            hint="the base or the adapter is damaged there; --exclude the tensor to merge the rest",
        )
    return norms
