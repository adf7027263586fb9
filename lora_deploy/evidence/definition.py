"""A planned tensor in float64, block by block: base values and what each update adds, for figures and diagnoses.

Bytes come from ``merge/shard`` alone; what is computed here is near enough to recognise a mistake, not to define a
merge.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_deploy.checkpoint import Checkpoint
from lora_deploy.merge.plan import PlannedTensor
from lora_deploy.merge.shard import base_rows, regions
from lora_deploy.rounding import torch_dtype
from lora_deploy.tensors import Region, TensorSpec
from lora_deploy.updates.addition import Addition
from lora_deploy.updates.additive import Additive
from lora_deploy.updates.interface import Update
from lora_deploy.updates.low_rank import LowRank

BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Block:
    """Some rows of a region, or a run of elements between regions."""

    region: Region
    rows: slice
    base: Tensor
    """(n, n_cols) float64; zeros where the base has no such tensor."""
    deltas: tuple[Tensor, ...]
    """(n, n_cols) float64 each: what every update adds; one for all if they are not additive, none between regions."""

    @property
    def delta(self) -> Tensor:
        """What all updates add together."""
        return torch.stack(self.deltas).sum(dim=0) if self.deltas else torch.zeros_like(self.base)

    @property
    def start(self) -> int:
        """Flat position of the first element."""
        return self.region.offset + int(self.rows.start) * self.region.n_cols

    @property
    def stop(self) -> int:
        """Flat position after the last element."""
        return self.region.offset + int(self.rows.stop) * self.region.n_cols


def blocks(tensor: PlannedTensor, base: Checkpoint, n_elements: int = BLOCK_ELEMENTS) -> Iterator[Block]:
    """Walk the whole tensor in the order of its elements."""
    end = 0
    for region, updates in regions(tensor):
        yield from _run(tensor, base, end, region.offset, n_elements)
        states: list[object] = []
        for update in updates:
            states.append(update.prepare(_Reader(tensor, base, region, updates[: len(states)], tuple(states))))
        for rows in row_slices(region, n_elements):
            before = base_block(tensor, base, region, rows)
            yield Block(region=region, rows=rows, base=before, deltas=_deltas(before, updates, rows, states))
        end = region.stop
    yield from _run(tensor, base, end, tensor.spec.n_elements, n_elements)


def row_slices(region: Region, n_elements: int = BLOCK_ELEMENTS) -> Iterator[slice]:
    """Cut a region into slices of whole rows."""
    step = max(1, n_elements // max(1, region.n_cols))
    for start in range(0, region.n_rows if region.n_cols else 0, step):
        yield slice(start, min(start + step, region.n_rows))


def base_block(tensor: PlannedTensor, base: Checkpoint, region: Region, rows: slice) -> Tensor:
    """Rows of the base tensor in float64; zeros where there is none of this size."""
    source = tensor.source
    if source is None or source.n_elements != tensor.spec.n_elements:
        return torch.zeros((rows.stop - rows.start, region.n_cols), dtype=torch.float64)
    return base_rows(base, source, region, rows).to(torch.float64)


def stored_block(merged: Checkpoint, spec: TensorSpec, block: Block) -> Tensor:
    """The stored values at a block's place, in its shape, in the stored dtype."""
    size = spec.dtype.n_bytes
    view = merged.read(spec.name, block.start * size, block.stop * size)
    return torch.frombuffer(view, dtype=torch_dtype(spec.dtype)).view(block.base.shape)


@dataclass(frozen=True, slots=True, eq=False)
class _Reader:
    """Gives rows of a region before an update."""

    tensor: PlannedTensor
    base: Checkpoint
    region: Region
    earlier: Sequence[Update]
    states: Sequence[object]

    def __call__(self, rows: slice) -> Tensor:
        start, stop, _ = rows.indices(self.region.n_rows)
        values = base_block(self.tensor, self.base, self.region, slice(start, stop))
        for update, state in zip(self.earlier, self.states, strict=True):
            values = update.block(values, slice(start, stop), state)
        return values


def _deltas(before: Tensor, updates: Sequence[Update], rows: slice, states: Sequence[object]) -> tuple[Tensor, ...]:
    if all(isinstance(update, LowRank | Addition | Additive) for update in updates):
        zeros = torch.zeros_like(before)
        return tuple(update.block(zeros, rows, state) for update, state in zip(updates, states, strict=True))
    values = before
    for update, state in zip(updates, states, strict=True):
        values = update.block(values, rows, state)
    return (values - before,)


def _run(tensor: PlannedTensor, base: Checkpoint, start: int, stop: int, n_elements: int) -> Iterator[Block]:
    for first in range(start, stop, n_elements):
        region = Region(offset=first, n_rows=1, n_cols=min(n_elements, stop - first))
        rows = slice(0, 1)
        yield Block(region=region, rows=rows, base=base_block(tensor, base, region, rows), deltas=())
