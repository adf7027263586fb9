"""Cut a planned tensor into chunks and compute each: where base bytes, updates and the output dtype meet.

Promise: the chunks of a tensor cover its elements once, in order; each is a pure function of base, plan and position,
so that any thread, process or machine may compute it, and so that ``evidence/replay`` can compute it again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from lora_deploy.checkpoint import Checkpoint
from lora_deploy.errors import MergeError
from lora_deploy.merge.exact import BlockFacts, merge_rows
from lora_deploy.merge.factors import Factors
from lora_deploy.merge.plan import PlannedTensor, Treatment
from lora_deploy.merge.stored import (
    change_facts,
    has_only_numbers,
    range_facts,
    refuse_non_finite,
    refuse_overflow,
    store,
)
from lora_deploy.merge.workspace import Workspace
from lora_deploy.rounding import torch_dtype
from lora_deploy.tensors import Place, Region, TensorSpec
from lora_deploy.updates.interface import Update
from lora_deploy.updates.low_rank import LowRank
from lora_deploy.updates.replacement import Replacement
from lora_deploy.updates.token_rows import TokenRows

CHUNK_ELEMENTS = 1 << 20
"""Elements of a chunk: what one worker computes at a time. Larger ones leave the cache before they are written."""
COPY_BYTES = 1 << 23
DEFINED_BLOCK_ELEMENTS = 1 << 20
"""Block of kinds that are evaluated in float64: part of their definition, because products may depend on it."""

_NO_BYTES = memoryview(b"")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chunk:
    """Some consecutive elements of an output tensor, and how to get them."""

    tensor: PlannedTensor
    start: int
    """First byte within the output tensor."""
    stop: int
    copied: memoryview = _NO_BYTES
    """The bytes themselves when nothing needs computing."""
    compute: Callable[[Workspace], tuple[Tensor, BlockFacts]] | None = None
    """Gives the elements in the output dtype, on the workspace's device."""

    def evaluate(self, workspace: Workspace) -> tuple[memoryview, BlockFacts]:
        """Give the chunk's bytes."""
        if self.compute is None:
            return self.copied, BlockFacts()
        with workspace.active():
            result, facts = self.compute(workspace)
            return bytes_of(workspace.fetch(result)), facts


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor of the CPU in row-major order, little endian; not copied unless it is not contiguous."""
    flat = tensor.detach().contiguous().view(-1)
    if flat.numel() == 1:  # a lone element may keep the stride of what it was cut from
        flat = flat.clone(memory_format=torch.contiguous_format)
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")


def base_rows(checkpoint: Checkpoint, spec: TensorSpec, region: Region, rows: slice) -> Tensor:
    """Map rows of a region of a base tensor: (n, n_cols) in the base's dtype; nothing is copied."""
    size = spec.dtype.n_bytes
    start = region.offset + rows.start * region.n_cols
    stop = region.offset + rows.stop * region.n_cols
    view = checkpoint.read(spec.name, start * size, stop * size)
    if not view.nbytes:
        return torch.empty((rows.stop - rows.start, region.n_cols), dtype=torch_dtype(spec.dtype))
    return torch.frombuffer(view, dtype=torch_dtype(spec.dtype)).view(rows.stop - rows.start, region.n_cols)


def chunks(
    tensor: PlannedTensor, checkpoint: Checkpoint, device: torch.device, chunk_elements: int = CHUNK_ELEMENTS
) -> Iterator[Chunk]:
    """Cut a planned tensor into chunks, in the order of its bytes."""
    if tensor.treatment is Treatment.UNTOUCHED and tensor.source is not None:
        yield from _copied(tensor, tensor.source, checkpoint)
        return
    end = 0
    for region, updates in regions(tensor):
        yield from _gap(tensor, checkpoint, end, region.offset, chunk_elements)
        yield from _RegionMerge(tensor, region, updates, checkpoint, device).chunks(chunk_elements)
        end = region.stop
    yield from _gap(tensor, checkpoint, end, tensor.spec.n_elements, chunk_elements)


def _copied(tensor: PlannedTensor, source: TensorSpec, checkpoint: Checkpoint) -> Iterator[Chunk]:
    for start in range(0, tensor.spec.n_bytes, COPY_BYTES):
        stop = min(start + COPY_BYTES, tensor.spec.n_bytes)
        checkpoint.fetch(source.name, start, stop)
        copied = checkpoint.read(source.name, start, stop)
        yield Chunk(tensor=tensor, start=start, stop=stop, copied=copied)


def regions(tensor: PlannedTensor) -> list[tuple[Region, list[Update]]]:
    """Group a tensor's updates by the region that they change, in the order of its elements.

    Raises:
        MergeError: Two regions overlap.
    """
    grouped: dict[Region, list[Update]] = {}
    for entry in tensor.updates:
        if isinstance(entry.update, Update):  # binding resolved every stack of experts
            grouped.setdefault(entry.region or Region.whole(tensor.spec.shape), []).append(entry.update)
    found = sorted(grouped.items(), key=lambda item: item[0])
    for (before, _), (after, _) in pairwise(found):
        if after.offset < before.stop:
            raise MergeError(f"{tensor.spec.name}: updates of overlapping regions {before} and {after}")
    return found


def _gap(tensor: PlannedTensor, checkpoint: Checkpoint, start: int, stop: int, chunk_elements: int) -> Iterator[Chunk]:
    """Elements that no update touches, as one long row each chunk."""
    for first in range(start, stop, chunk_elements):
        region = Region(offset=first, n_rows=1, n_cols=min(chunk_elements, stop - first))
        yield from _RegionMerge(tensor, region, [], checkpoint, torch.device("cpu")).chunks(chunk_elements)


@dataclass(slots=True, eq=False)
class _RegionMerge:
    """One region and its updates; what needs more than one block is prepared once, by the first worker that comes."""

    tensor: PlannedTensor
    region: Region
    updates: Sequence[Update]
    checkpoint: Checkpoint
    device: torch.device
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _factors: Factors | None = None
    _states: list[object] | None = None

    def chunks(self, chunk_elements: int) -> Iterator[Chunk]:
        n_rows, n_cols = self.region.n_rows, self.region.n_cols
        elements = chunk_elements if self._is_exact else DEFINED_BLOCK_ELEMENTS
        step = max(1, elements // max(1, n_cols))
        size = self.tensor.spec.dtype.n_bytes
        for first in range(0, n_rows if n_cols else 0, step):
            rows = slice(first, min(first + step, n_rows))
            start = (self.region.offset + rows.start * n_cols) * size
            stop = (self.region.offset + rows.stop * n_cols) * size
            self._fetch(rows)
            yield Chunk(tensor=self.tensor, start=start, stop=stop, compute=partial(self._compute, rows))

    def _fetch(self, rows: slice) -> None:
        source = self.tensor.source
        if source is not None and source.shape == self.tensor.spec.shape:
            size, n_cols = source.dtype.n_bytes, self.region.n_cols
            start = self.region.offset + rows.start * n_cols
            self.checkpoint.fetch(source.name, start * size, (start + (rows.stop - rows.start) * n_cols) * size)

    @property
    def _place(self) -> Place:
        return Place(self.tensor.spec.name, self.tensor.spec.shape, self.region)

    @property
    def _is_exact(self) -> bool:
        return all(update.is_exact for update in self.updates)

    def _compute(self, rows: slice, workspace: Workspace) -> tuple[Tensor, BlockFacts]:
        if not self._is_exact:
            return self._defined(rows)
        weights = self._before_low_rank(rows)
        low_ranks = [update for update in self.updates if isinstance(update, LowRank)]
        if not low_ranks:
            return self._rounded(weights, rows)
        while True:
            try:
                return self._merged(weights, low_ranks, rows, workspace)
            except torch.OutOfMemoryError as error:
                if not workspace.shrink():
                    problem = f"{workspace.device} has too little free memory for the smallest blocks"
                    hint = "free some of it, or --device cpu"
                    raise MergeError(f"{self.tensor.spec.name}: {problem}", hint=hint) from error
            torch.cuda.empty_cache()  # here, where the failed attempt holds nothing any more

    def _merged(
        self, weights: Tensor, low_ranks: list[LowRank], rows: slice, workspace: Workspace
    ) -> tuple[Tensor, BlockFacts]:
        factors = self._prepared_factors(low_ranks)
        dtype = self.tensor.spec.dtype
        merged, facts = merge_rows(self._place, workspace.bring(weights), factors, rows, dtype, workspace)
        if rows.start == 0:  # of the whole region, so told once
            facts.delta_square = factors.delta_square
        return merged, facts

    def _before_low_rank(self, rows: slice) -> Tensor:
        """Rows that low-rank sums are added to: the base's, or the adapter's own where it replaces them."""
        weights = self._base(rows)
        for update in self.updates:
            if isinstance(update, Replacement):
                weights = update.values.reshape(update.shape)[rows]
            elif isinstance(update, TokenRows) and any(rows.start <= index < rows.stop for index in update.indices):
                weights = update.block(weights.to(torch.float64), rows, None)
        return weights

    def _base(self, rows: slice) -> Tensor:
        """Rows of the base; nothing where the adapter's own values take their place, whose shape may differ."""
        if self.tensor.source is None or any(isinstance(update, Replacement) for update in self.updates):
            return torch.empty(0)
        return base_rows(self.checkpoint, self.tensor.source, self.region, rows)

    def _prepared_factors(self, low_ranks: list[LowRank]) -> Factors:
        with self._lock:
            if self._factors is None:
                self._factors = Factors(low_ranks, self.device)
                if self.device.type == "cuda":  # other workers have streams of their own, which would not wait
                    torch.cuda.current_stream(self.device).synchronize()
            return self._factors

    def _rounded(self, weights: Tensor, rows: slice) -> tuple[Tensor, BlockFacts]:
        """Round values that no arithmetic touched: casts and replacements."""
        stored = store(weights, self.tensor.spec.dtype)
        if not has_only_numbers(stored):
            refuse_overflow(self._place, rows.start, weights, stored)
            if self.updates:
                refuse_non_finite(self._place, rows.start, weights, "what the adapter puts there")
        return stored, range_facts(weights, stored)

    def _defined(self, rows: slice) -> tuple[Tensor, BlockFacts]:
        """Evaluate kinds that are defined in float64, block by fixed block, on the CPU."""
        before = self._base(rows).to(torch.float64)
        states = self._prepared_states()
        values = before
        for update, state in zip(self.updates, states, strict=True):
            values = update.block(values, rows, state)
        stored = store(values, self.tensor.spec.dtype)
        if not has_only_numbers(stored):
            if before.numel():
                refuse_non_finite(self._place, rows.start, before, "the base")
            refuse_overflow(self._place, rows.start, values, stored)
            refuse_non_finite(self._place, rows.start, values, "the result")
        return stored, change_facts(before, values, stored)

    def _prepared_states(self) -> list[object]:
        with self._lock:
            if self._states is None:
                states: list[object] = []
                for update in self.updates:
                    states.append(update.prepare(self._reader(len(states), states)))
                self._states = states
            return self._states

    def _reader(self, n_applied: int, states: list[object]) -> Callable[[slice], Tensor]:
        """Read rows as they are after the first ``n_applied`` updates."""

        def read(rows: slice) -> Tensor:
            start, stop, _ = rows.indices(self.region.n_rows)
            exact_rows = slice(start, stop)
            values = self._base(exact_rows).to(torch.float64)
            for update, state in zip(self.updates[:n_applied], states, strict=False):
                values = update.block(values, exact_rows, state)
            return values

        return read
