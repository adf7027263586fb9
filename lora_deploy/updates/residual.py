"""Updates on a base that training changed first, in a way that the base itself determines: W' = W − C(W) + s·B·A.

PiSSA moves the r largest singular components of W into the factors before it trains them, OLoRA s times the first r
columns and rows of its QR factorisation. The file keeps the trained factors only; C is computed again from W, in
float64, where the peer computes it in float32: the two differ by float32's rounding of a factorisation.

Promise: C is a pure function of the stored W. For PiSSA it is the same whether W is stored as (out, in) or (in, out);
OLoRA factorises W as it is stored, as the peer does.
Source: PiSSA, arXiv:2404.02948; OLoRA, arXiv:2406.01775; peft 0.21.2, ``tuners/lora/layer.py``, ``pissa_init`` and
``olora_init``.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch

from lora_deploy.errors import MergeError
from lora_deploy.updates.interface import ReadRows, Update, refuse_weight
from lora_deploy.updates.low_rank import LowRank

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Component:
    """A matrix ``left @ right`` that is taken out of the weight; it holds no more memory than its own."""

    left: Tensor
    """(n_rows, k) float64."""
    right: Tensor
    """(k, n_cols) float64."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WithoutComponent(Update):
    """Takes a component out of the weight that only the whole weight determines, then adds a low-rank delta."""

    low_rank: LowRank

    @abstractmethod
    def component(self, weight: Tensor) -> Component:
        """Compute what is taken out of ``weight`` (n_rows, n_cols) float64.

        Raises:
            MergeError: The weight has fewer singular components than the update needs.
        """

    @property
    def needs_whole(self) -> bool:
        """A factorisation needs all rows at once."""
        return True

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the region."""
        return self.low_rank.shape

    @property
    def n_bytes(self) -> int:
        """Memory of the factors in bytes."""
        return self.low_rank.n_bytes

    def transposed(self) -> Self:
        """Transpose the delta; the component is computed from the weight as it is stored."""
        return replace(self, low_rank=self.low_rank.transposed())

    def weighted(self, weight: float) -> Self:
        """The component that was taken out cannot be weighted with the delta."""
        return refuse_weight(self, weight)

    def prepare(self, read: ReadRows) -> Component:
        """Factorise the whole region."""
        return self.component(read(slice(0, self.shape[0])))

    def block(self, weight_rows: Tensor, rows: slice, state: object) -> Tensor:
        """W − left·right + s·B·A for some rows."""
        assert isinstance(state, Component)  # noqa: S101 - what prepare gave
        return weight_rows - state.left[rows] @ state.right + self.low_rank.delta(rows)

    def check_rank(self, most: int) -> None:
        """Check the rank against what the weight allows.

        Raises:
            MergeError: The rank is larger.
        """
        if self.low_rank.rank > most:
            raise MergeError(f"{self.kind}: rank {self.low_rank.rank}, a {self.shape} weight allows at most {most}")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Residual(WithoutComponent):
    """Low-rank delta on the residual base of PiSSA or OLoRA."""

    kind: ClassVar[str] = "residual"

    method: Literal["pissa", "olora"]

    def component(self, weight: Tensor) -> Component:
        """Compute the component that the initialisation moved into the factors."""
        rank = self.low_rank.rank
        self.check_rank(min(weight.shape))
        if self.method == "pissa":
            left, sizes, right = torch.linalg.svd(weight, full_matrices=False)
            return Component(left=left[:, :rank] * sizes[:rank], right=right[:rank].clone())
        left, right = torch.linalg.qr(weight)
        return Component(left=left[:, :rank] * self.low_rank.scale.value, right=right[:rank].clone())
