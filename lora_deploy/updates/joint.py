"""Weights given anew in a basis that layers share (FRoD): W' = U·(S + diag(l))·V^T where W = U·diag(n)·V^T.

V (in, in) is in the file, shared by all layers of a role; U has unit columns, n their lengths in W·V^-T. S is sparse.

Definition: W·V^-T by an LU factorisation of V in float64; n² summed over fixed blocks of rows; columns whose length is
1e-12 or less count as zero, as in the peer. The peer rounds U to float32.
Source: peft 0.21.2, ``tuners/frod/layer.py``, ``_calculate_frod_u_and_lambda`` and ``get_delta_weight``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

import torch

from lora_deploy.errors import MergeError
from lora_deploy.updates.interface import ReadRows, Update, refuse_weight
from lora_deploy.updates.reduction import row_blocks

if TYPE_CHECKING:
    from torch import Tensor

_NO_LENGTH = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Prepared:
    factorised: tuple[Tensor, Tensor]
    """LU and pivots of V."""
    map: Tensor
    """(in, in) float64: diag(1/n)·(S + diag(l))·V^T, which W·V^-T is multiplied by."""
    result: Tensor | None
    """The whole region where it is stored as (in, out)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Joint(Update):
    """Puts trained coefficients between the weight's own left basis and the shared right one."""

    kind: ClassVar[str] = "joint"

    basis: Tensor
    """(in, in): V, shared by layers; any floating dtype."""
    diagonal: Tensor
    """(in,): l."""
    row: Tensor
    """(m,) integers: rows of S's entries."""
    column: Tensor
    """(m,) integers: columns of S's entries."""
    entries: Tensor
    """(m,): S's values."""
    n_out: int
    is_turned: bool = False
    """Whether the region is (in, out)."""

    @property
    def needs_whole(self) -> bool:
        """Only where rows are inputs, which the basis mixes."""
        return self.is_turned

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the region."""
        sides = (self.n_out, len(self.diagonal))
        return sides[::-1] if self.is_turned else sides

    @property
    def n_bytes(self) -> int:
        """Memory of all tensors in bytes, the shared basis among them."""
        tensors = (self.basis, self.diagonal, self.row, self.column, self.entries)
        return sum(tensor.nbytes for tensor in tensors)

    @property
    def n_prepared_bytes(self) -> int:
        """V, its factorisation, S and the map in float64."""
        return 8 * 5 * len(self.diagonal) ** 2

    def transposed(self) -> Self:
        """The same change of a weight that is stored the other way round."""
        return replace(self, is_turned=not self.is_turned)

    def weighted(self, weight: float) -> Self:
        """The weight is given anew: that cannot be weighted."""
        return refuse_weight(self, weight)

    def prepare(self, read: ReadRows) -> _Prepared:
        """Factorise V and measure the columns of W·V^-T.

        Raises:
            MergeError: V is singular.
        """
        basis = self.basis.to(torch.float64)
        factorised, pivots, fault = torch.linalg.lu_factor_ex(basis)
        if int(fault):
            raise MergeError(f"{self.kind}: the shared {tuple(basis.shape)} basis of the adapter is singular")
        whole = read(slice(0, len(self.diagonal))).T if self.is_turned else None
        squares = torch.zeros(len(basis), dtype=torch.float64)
        for rows in row_blocks(self.n_out):
            weight = read(rows) if whole is None else whole[rows]
            squares += _in_basis(weight, (factorised, pivots)).square_().sum(dim=0)
        lengths = squares.sqrt_()
        inverse = torch.where(lengths > _NO_LENGTH, 1 / lengths, 0.0)
        state = _Prepared(
            factorised=(factorised, pivots), map=inverse[:, None] * (self._coefficients() @ basis.T), result=None
        )
        if whole is None:
            return state
        parts = [_in_basis(whole[rows], state.factorised) @ state.map for rows in row_blocks(self.n_out)]
        return replace(state, result=torch.cat(parts).T.contiguous())

    def block(self, weight_rows: Tensor, rows: slice, state: object) -> Tensor:
        """Give the rows anew."""
        assert isinstance(state, _Prepared)  # noqa: S101 - what prepare gave
        if state.result is not None:
            return state.result[rows]
        return _in_basis(weight_rows, state.factorised) @ state.map

    def _coefficients(self) -> Tensor:
        """S + diag(l), dense."""
        size = len(self.diagonal)
        flat = torch.zeros(size * size, dtype=torch.float64)
        places = self.row.to(torch.int64) * size + self.column.to(torch.int64)
        flat.index_add_(0, places, self.entries.to(torch.float64))
        return flat.view(size, size) + torch.diag(self.diagonal.to(torch.float64))


def _in_basis(weight: Tensor, factorised: tuple[Tensor, Tensor]) -> Tensor:
    """Rows of W·V^-T."""
    solved: Tensor = torch.linalg.lu_solve(*factorised, weight.T)
    return solved.T
