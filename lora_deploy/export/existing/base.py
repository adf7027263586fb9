"""An existing export as a base: its explained weights are the tensors of a checkpoint.

Promise: a tensor is read in the layout that the model's checkpoint has, block by block, from where the graph keeps it;
nothing is converted on disk, and nothing outside the export's folder is opened.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lora_deploy.checkpoint import Checkpoint
from lora_deploy.export.binding_table import Joined, Origin, Slot, Taken, shape_of
from lora_deploy.tensors import DType

Stored: TypeAlias = NDArray[Any]
"""Elements as integers of their size, in the axes of the array they are a view of."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OnnxBase(Checkpoint):
    """Graphs and their weights, seen as the checkpoint that they were exported from."""

    graphs: tuple[str, ...]
    """Graph files, relative to the root."""
    slots: tuple[Slot, ...]
    """Runs of bytes whose tensors can be changed."""
    views: Mapping[str, tuple[Stored, ...]]
    """By tensor name, in the checkpoint's layout; several where the export holds copies."""
    aliases: tuple[tuple[str, ...], ...] = ()
    """Names of one and the same matrix."""
    is_own: bool = False
    """Whether an export of ours says where its weights come from."""
    travelling: Mapping[str, Path] = field(default_factory=dict)
    """Files beside graphs and weights that belong to the export."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> memoryview:
        """Give bytes ``start:stop`` of a tensor; a copy of the rows that they are in, where it is not stored so."""
        return read_view(self.views[name][0], start, stop)

    def fetch(self, name: str, start: int, stop: int) -> None:
        """Leave it to the system: rows of a turned matrix are spread over all of it."""


def read_view(view: Stored, start: int = 0, stop: int | None = None) -> memoryview:
    """Give bytes of a view in its own row-major order."""
    end = view.nbytes if stop is None else stop
    if view.ndim == 0 or not view.nbytes:
        return memoryview(view.tobytes())[start:end]
    n_row_bytes = view.nbytes // len(view)
    first, last = start // n_row_bytes, -(-end // n_row_bytes)
    rows = view[first:last]
    if not (rows.flags.c_contiguous and rows.flags.aligned):
        rows = np.array(rows, order="C")  # aligned, which the arithmetic wants
    flat = rows.reshape(-1).view(np.uint8).data
    return flat[start - first * n_row_bytes : end - first * n_row_bytes]


def map_file(path: Path) -> mmap.mmap | None:
    """Map a file of weights; None for an empty one."""
    if not path.stat().st_size:
        return None
    with path.open("rb") as stream:
        # ACCESS_COPY: tensor libraries want a writable buffer; nobody writes, so no page is ever copied.
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)


def stored_array(content: mmap.mmap | None, slot: Slot) -> Stored:
    """View a slot as it lies in its file."""
    dtype = np.dtype(f"u{DType(slot.dtype).n_bytes}")
    if content is None or not slot.n_bytes:
        return np.empty(slot.shape, dtype)
    return np.frombuffer(content, dtype, math.prod(slot.shape), slot.offset).reshape(slot.shape)


def is_restorable(origin: Origin) -> bool:
    """Whether the tensors can be read back from an initializer: moved only, not computed with."""
    if isinstance(origin, Taken):
        order = origin.permutation
        return not origin.plus and (order is None or len(order) == len(origin.shape))
    return isinstance(origin, Joined) and all(map(is_restorable, origin.parts))


def views_of(origin: Origin, stored: Stored) -> Iterator[tuple[str, Stored]]:
    """Undo what an origin says: views of the tensors in the checkpoint's layout."""
    for taken, view in _parts(origin, stored):
        order = taken.permutation
        yield taken.tensor, view if order is None else view.transpose(np.argsort(order))


def _parts(origin: Origin, stored: Stored) -> Iterator[tuple[Taken, Stored]]:
    if isinstance(origin, Taken):
        yield origin, stored
    elif isinstance(origin, Joined):
        start = 0
        for part in origin.parts:
            assert isinstance(part, Taken | Joined)  # noqa: S101 - constants are no part of anything
            along = np.moveaxis(stored, origin.axis, 0)
            if origin.is_stack:
                yield from _parts(part, along[start])
                start += 1
            else:
                stop = start + shape_of(part)[origin.axis]
                yield from _parts(part, np.moveaxis(along[start:stop], 0, origin.axis))
                start = stop
