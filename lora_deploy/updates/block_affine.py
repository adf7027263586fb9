"""Blocks multiplied and shifted (MiSS and Bone in mode ``bat``): W'[a, b] = W[a, b] + s·(W[a, b] + 1)·D[a].

The weight is cut into r by r blocks W[a, b]; all blocks of one row of blocks share D[a], and 1 is the identity.
Definition: rows of W are viewed as (n, n_cols / r, r) and multiplied by their D[a] in one float64 product.
Source: MiSS, arXiv:2409.15371; peft 0.21.2, ``tuners/miss/layer.py``, ``get_delta_weight``; peft 0.18,
``tuners/bone/layer.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

import torch

from lora_deploy.errors import UnmergeableAdapterError
from lora_deploy.updates.interface import Scale, Update

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockAffine(Update):
    """Adds W·D + D block by block."""

    kind: ClassVar[str] = "block-affine"

    blocks: Tensor
    """(n_rows / r, r, r): D, any floating dtype."""
    n_cols: int
    """A multiple of r."""
    scale: Scale

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the region."""
        return self.blocks.shape[0] * self.blocks.shape[1], self.n_cols

    @property
    def n_bytes(self) -> int:
        """Memory of the blocks in bytes."""
        return self.blocks.nbytes

    def transposed(self) -> Self:
        """PEFT adapts no layer like this that is stored as (in, out).

        Raises:
            UnmergeableAdapterError: Always.
        """
        message = (
            f"a {self.kind} update multiplies blocks from their input side: it has no form for an (in, out) weight"
        )
        raise UnmergeableAdapterError(message)

    def weighted(self, weight: float) -> Self:
        """Multiply the scale: the change is linear in D."""
        return replace(self, scale=self.scale.times(weight))

    def block(self, weight_rows: Tensor, rows: slice, state: object) -> Tensor:
        """Multiply each row's parts by its block, and add the block's own row to each part."""
        del state
        start, stop, _ = rows.indices(self.shape[0])
        r = self.blocks.shape[1]
        result = weight_rows.clone()
        for a in range(start // r, -(-stop // r)):
            first, last = max(start, a * r), min(stop, (a + 1) * r)
            of_block = self.blocks[a].to(torch.float64)
            parts = weight_rows[first - start : last - start].reshape(last - first, -1, r)
            change = parts @ of_block + of_block[first - a * r : last - a * r, None, :]
            result[first - start : last - start] += self.scale.value * change.reshape(last - first, -1)
        return result
