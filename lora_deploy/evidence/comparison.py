"""Compare stored tensors with what the plan defines, chunk by chunk, in the threads that compute the definition.

Promise: every stored byte of every tensor given is compared, once; memory is bounded as the merge's is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_deploy.checkpoint import Checkpoint
from lora_deploy.errors import NonFiniteTensorError
from lora_deploy.evidence.orders import Order
from lora_deploy.evidence.replayer import Misses, Replayer
from lora_deploy.merge.budget import fit
from lora_deploy.merge.exact import BlockFacts
from lora_deploy.merge.local import chosen_device, local_workers
from lora_deploy.merge.plan import MergePlan, PlannedTensor
from lora_deploy.merge.progress import Progress, reporting
from lora_deploy.merge.shard import Chunk, chunks
from lora_deploy.merge.workspace import Workspace
from lora_deploy.rounding import round_once, torch_dtype
from lora_deploy.tensors import TensorSpec

_WORD_BYTES = 8
_FEW = 64
"""Elements that may be missed for an order still to be told of: a damaged tensor is not an unmerged one."""
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(slots=True, kw_only=True, eq=False)
class Comparison:
    """One stored tensor against one planned one, and what was seen so far."""

    name: str
    """What to call it in the report."""
    tensor: PlannedTensor
    """In the dtype that was found."""
    stored: TensorSpec
    orders: dict[Order, Misses]
    """Known orders of rounding that explain every element seen so far, or all but a few."""
    n_different: int = 0
    """Elements that are not the definition's, to the bit."""
    first: int | None = None
    """Flat position of the first of them."""
    shows_update: bool = False
    """Whether some element is not the rounded base's."""
    error: str = ""
    """Why the definition has no value here."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def is_named_alike(self) -> bool:
        """Whether the folder calls the tensor what the report calls it."""
        return self.name == self.stored.name == self.tensor.spec.name

    @property
    def n_elements(self) -> int:
        """Number of elements."""
        return self.tensor.spec.n_elements

    @property
    def explanation(self) -> Order | None:
        """The first order that explains every element."""
        return next((order for order, misses in self.orders.items() if not misses.n_elements), None)

    @property
    def best(self) -> tuple[Order, Misses] | None:
        """The order that explains most, where one explains all but a few elements."""
        return min(self.orders.items(), key=lambda item: item[1].n_elements, default=None)

    def add(self, positions: NDArray[np.int64]) -> tuple[Order, ...]:
        """Count flat positions that differ; give the orders that are still to be asked about them."""
        with self._lock:
            self.n_different += len(positions)
            self.first = int(positions[0]) if self.first is None else min(self.first, int(positions[0]))
            return tuple(self.orders)

    def miss(self, misses: Mapping[Order, Misses]) -> None:
        """Take in the elements that orders do not explain; orders that miss more than a few are dropped."""
        few = min(_FEW, max(1, self.n_elements // 1000))
        with self._lock:
            for order, found in misses.items():
                if order in self.orders:
                    self.orders[order] = self.orders[order] + found
            self.orders = {order: found for order, found in self.orders.items() if found.n_elements <= few}


def compare(
    plan: MergePlan, merged: Checkpoint, comparisons: Sequence[Comparison], progress: Progress | None = None
) -> None:
    """Fill in the comparisons, one pass over all bytes.

    Raises:
        MemoryBudgetError: The plan's memory budget is too small.
    """
    base = plan.binding.checkpoint
    footprint, device = fit(plan), chosen_device(plan.options.device)

    def checks() -> Iterator[Chunk]:
        for comparison in comparisons:
            check = _Check(comparison, base, merged)
            for chunk in chunks(comparison.tensor, base, device, footprint.chunk_elements):
                yield replace(chunk, copied=memoryview(b""), compute=check.of(chunk))

    n_bytes = sum(comparison.stored.n_bytes for comparison in comparisons)
    with (
        reporting(progress, "replaying", n_bytes) as advance,
        local_workers(footprint.n_workers, footprint.n_ahead, device, is_compiled=footprint.is_compiled) as workers,
    ):
        for chunk, _, _ in workers.evaluate(checks()):
            advance(chunk.stop - chunk.start)


class _Check:
    """The comparison of one tensor's chunks; called from any thread."""

    def __init__(self, comparison: Comparison, base: Checkpoint, merged: Checkpoint) -> None:
        self.comparison = comparison
        self.base = base
        self.merged = merged
        self.replayer = Replayer(comparison.tensor, base)

    def of(self, chunk: Chunk) -> Callable[[Workspace], tuple[Tensor, BlockFacts]]:
        """Make the chunk's computation its own comparison."""

        def computation(workspace: Workspace) -> tuple[Tensor, BlockFacts]:
            if not self.comparison.error:
                try:
                    self._compare(chunk, workspace)
                except NonFiniteTensorError as error:
                    self.comparison.error = error.message
            return torch.empty(0), BlockFacts()

        return computation

    def _compare(self, chunk: Chunk, workspace: Workspace) -> None:
        expected, _ = chunk.evaluate(workspace)
        found = self.merged.read(self.comparison.stored.name, chunk.start, chunk.stop)
        if self.comparison.tensor.updates and not self.comparison.shows_update:
            self.comparison.shows_update = not self._is_base(chunk, found)
        if has_same_bytes(expected, found):
            return
        size = self.comparison.stored.dtype.n_bytes
        positions = np.flatnonzero(_elements(expected, size) != _elements(found, size)) + chunk.start // size
        orders = self.comparison.add(positions)
        if orders:
            flat = torch.from_numpy(positions)
            values = _as_tensor(found, self.comparison.stored)[flat - chunk.start // size].to(torch.float64)
            self.comparison.miss(self.replayer.misses(orders, flat, values, _FEW))

    def _is_base(self, chunk: Chunk, found: memoryview) -> bool:
        """Whether these are the base's values, rounded to the stored format."""
        source, stored = self.comparison.tensor.source, self.comparison.stored
        if source is None or source.n_elements != stored.n_elements:
            return False
        size = stored.dtype.n_bytes
        start, stop = chunk.start // size * source.dtype.n_bytes, chunk.stop // size * source.dtype.n_bytes
        weights = _as_tensor(self.base.read(source.name, start, stop), source)
        rounded = round_once(weights, stored.dtype) if weights.dtype == torch.float64 else weights
        return torch.equal(rounded.to(torch_dtype(stored.dtype)), _as_tensor(found, stored))


def has_same_bytes(one: memoryview, other: memoryview) -> bool:
    """Whether two buffers of equal length are equal, eight bytes at a time."""
    whole = one.nbytes // _WORD_BYTES * _WORD_BYTES
    if not np.array_equal(np.frombuffer(one[:whole], np.int64), np.frombuffer(other[:whole], np.int64)):
        return False
    return bytes(one[whole:]) == bytes(other[whole:])


def _elements(view: memoryview, size: int) -> NDArray[np.unsignedinteger]:
    return np.frombuffer(view, _BITS[size])


def _as_tensor(view: memoryview, spec: TensorSpec) -> Tensor:
    if not view.nbytes:
        return torch.empty(0, dtype=torch_dtype(spec.dtype))
    return torch.frombuffer(view, dtype=torch_dtype(spec.dtype))
