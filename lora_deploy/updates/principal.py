"""Updates that turn the weight's principal components among themselves (PSOFT): W' = W + U·S^(1−e)·(R − 1)·S^e·V.

U·S·V are the r largest singular components of W, e is 0 (``psoft_init``) or 1/2 (``pissa_init``); R is trained.

R is no identity, so the signs that the factorisation gave to single components matter, and with equal singular values
even their choice: the factorisation is therefore the peer's own, LAPACK's in float32 on one CPU thread, of the weight
as float32. What follows it is float64. Training on another device may have seen other signs; only the peer's loader
could tell, which on a CPU does the same.
Source: PSOFT (peft 0.21.2, ``tuners/psoft/layer.py``, ``_build_psoft_ab_cache_buffers`` and ``get_delta_weight``).
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import torch

from lora_deploy.errors import UnmergeableAdapterError
from lora_deploy.updates.interface import ReadRows, Update, refuse_weight
from lora_deploy.updates.residual import Component

if TYPE_CHECKING:
    from torch import Tensor

_DRAWING = threading.Lock()
"""torch's randomised factorisation draws from the process's one generator, which other workers may be seeding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Randomised:
    """How ``torch.svd_lowrank`` is asked for the components."""

    n_iterations: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Principal(Update):
    """Multiplies R in between the principal components of the weight."""

    kind: ClassVar[str] = "principal"

    rotation: Tensor
    """(r, r): R, in float64."""
    is_split: bool
    """Whether the singular values lie half on each side of R (e = 1/2), or all on U's."""
    randomised: Randomised | None
    """None for the full factorisation."""
    n_rows: int
    n_cols: int

    @property
    def needs_whole(self) -> bool:
        """A factorisation needs all rows at once."""
        return True

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the region."""
        return self.n_rows, self.n_cols

    @property
    def n_bytes(self) -> int:
        """Memory of R in bytes."""
        return self.rotation.nbytes

    def transposed(self) -> Self:
        """PEFT adapts no layer like this that is stored as (in, out).

        Raises:
            UnmergeableAdapterError: Always.
        """
        message = (
            f"a {self.kind} update was trained on a factorisation of (out, in): an (in, out) weight may have another"
        )
        raise UnmergeableAdapterError(message)

    def weighted(self, weight: float) -> Self:
        """A rotation cannot be weighted."""
        return refuse_weight(self, weight)

    def prepare(self, read: ReadRows) -> Component:
        """Factorise the whole region as the peer does, and form both sides of what is added."""
        left, sizes, right = self._factorised(read(slice(0, self.n_rows)).to(torch.float32))
        turned = self.rotation - torch.eye(len(self.rotation), dtype=torch.float64)
        if self.is_split:
            roots = sizes.sqrt()
            return Component(left=left * roots, right=turned @ (roots[:, None] * right))
        return Component(left=left * sizes, right=turned @ right)

    def block(self, weight_rows: Tensor, rows: slice, state: object) -> Tensor:
        """Add the rows' part of the product."""
        assert isinstance(state, Component)  # noqa: S101 - what prepare gave
        return weight_rows + state.left[rows] @ state.right

    def _factorised(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The r largest components, in float64: (n_rows, r), (r,), (r, n_cols)."""
        rank = len(self.rotation)
        if self.randomised is None:
            left, sizes, right = torch.linalg.svd(weight, full_matrices=False)
        else:
            with _DRAWING, torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.randomised.seed)
                left, sizes, columns = torch.svd_lowrank(weight, q=rank, niter=self.randomised.n_iterations)
            right = columns.T
        return left[:, :rank].to(torch.float64), sizes[:rank].to(torch.float64), right[:rank].to(torch.float64)
