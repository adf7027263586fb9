"""Weights whose inputs or outputs are turned (OFT, BOFT, HRA, RoAd): W' = W·M or W' = M^T·W, and rows scaled.

M is a product of turns: block-diagonal matrices, each between a permutation and its inverse, or reflections. What is
turned is one axis of the weight; the vectors along it are multiplied by M from the right, one turn after another.

Definition: every turn in float64, in the given order. Where the turned axis is that of rows, the whole region is turned
at once; else row block by row block.
Source: OFT, arXiv:2306.07280; BOFT, arXiv:2311.06243; HRA, arXiv:2405.17484; RoAd, arXiv:2409.00119.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self, TypeAlias

import torch

from lora_deploy.updates.interface import ReadRows, Update, refuse_weight

if TYPE_CHECKING:
    from torch import Tensor


Axis: TypeAlias = Literal["rows", "columns"]


def _other(axis: Axis) -> Axis:
    return "columns" if axis == "rows" else "rows"


class Turn(ABC):
    """A matrix that vectors are multiplied with from the right."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Length of the vectors."""

    @property
    @abstractmethod
    def n_bytes(self) -> int:
        """Memory in bytes."""

    @abstractmethod
    def of(self, vectors: Tensor) -> Tensor:
        """Turn vectors: (n, size) float64."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Blocks(Turn):
    """A block-diagonal matrix between a permutation and its inverse."""

    blocks: Tensor
    """(n, b, b) float64; (1, b, b) stands for ``n_blocks`` equal ones."""
    n_blocks: int
    order: Tensor | None = None
    """(size,) int64: the positions that come first, second … before the blocks are applied; None: as they are."""

    @property
    def size(self) -> int:
        """Length of the vectors."""
        return self.n_blocks * int(self.blocks.shape[1])

    @property
    def n_bytes(self) -> int:
        """Memory in bytes."""
        return self.blocks.nbytes + (0 if self.order is None else self.order.nbytes)

    def of(self, vectors: Tensor) -> Tensor:
        """Bring each block's positions together, turn them, and put them back."""
        width = int(self.blocks.shape[1])
        given = vectors if self.order is None else vectors[:, self.order]
        parts = given.reshape(len(vectors), self.n_blocks, width).transpose(0, 1)
        turned = torch.matmul(parts, self.blocks).transpose(0, 1).reshape(len(vectors), self.size)
        if self.order is None:
            return turned
        result = torch.empty_like(turned)
        result[:, self.order] = turned
        return result


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reflections(Turn):
    """Householder reflections, one after another: I - 2·u·u^T for each column u of unit length."""

    normals: Tensor
    """(size, r) float64, columns of unit length."""

    @property
    def size(self) -> int:
        """Length of the vectors."""
        return int(self.normals.shape[0])

    @property
    def n_bytes(self) -> int:
        """Memory in bytes."""
        return self.normals.nbytes

    def of(self, vectors: Tensor) -> Tensor:
        """Reflect."""
        result = vectors.clone()
        for normal in self.normals.T:
            result -= 2 * (result @ normal)[:, None] * normal[None, :]
        return result


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rotation(Update):
    """Turns the vectors along one axis of the weight."""

    kind: ClassVar[str] = "rotation"

    turns: tuple[Turn, ...]
    """In the order in which they are applied; all of one size."""
    axis: Axis
    """Which axis is turned: ``columns`` turns each row as a vector."""
    n_other: int
    """Size of the axis that is not turned."""
    lengths: Tensor | None = None
    """(n_rows,) or (n_cols,), by ``lengths_axis``: what is multiplied after the turns."""
    lengths_axis: Axis = "rows"

    @property
    def needs_whole(self) -> bool:
        """Rows that are turned among themselves are needed together."""
        return self.axis == "rows"

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the region."""
        sides = (self.n_other, self.turns[0].size)
        return sides if self.axis == "columns" else sides[::-1]

    @property
    def n_bytes(self) -> int:
        """Memory of the turns in bytes."""
        return sum(turn.n_bytes for turn in self.turns) + (0 if self.lengths is None else self.lengths.nbytes)

    def transposed(self) -> Self:
        """Turn the other axis."""
        return replace(self, axis=_other(self.axis), lengths_axis=_other(self.lengths_axis))

    def weighted(self, weight: float) -> Self:
        """A product cannot be weighted."""
        return refuse_weight(self, weight)

    def prepare(self, read: ReadRows) -> Tensor | None:
        """Turn the whole region where rows are turned."""
        if self.axis == "columns":
            return None
        return self._turned(read(slice(0, self.shape[0])).T).T

    def block(self, weight_rows: Tensor, rows: slice, state: object) -> Tensor:
        """Turn rows, or take them from the turned region."""
        turned = self._turned(weight_rows) if state is None else state[rows]  # type: ignore[index] # what prepare gave
        if self.lengths is None:
            return turned
        lengths = self.lengths.to(torch.float64)
        scaled: Tensor = turned * (lengths[rows, None] if self.lengths_axis == "rows" else lengths[None, :])
        return scaled

    def _turned(self, vectors: Tensor) -> Tensor:
        for turn in self.turns:
            vectors = turn.of(vectors)
        return vectors
