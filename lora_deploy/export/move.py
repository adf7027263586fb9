"""Lay a checkpoint's bytes out as graphs want them, block by block and ahead of whoever takes them.

Promise: the bytes are those that ``apply.materialise`` gives, for every origin that needs no arithmetic but widening
and the one addition. Memory is a few blocks, whatever a tensor's size; no tensor library is loaded, because loading one
takes longer than all of this does for a model of 135M parameters.
"""

from __future__ import annotations

import math
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from lora_deploy.checkpoint import Checkpoint
from lora_deploy.errors import ExportError
from lora_deploy.export.binding_table import Joined, Kept, Origin, Quantised, Slot, Taken, shape_of, taken_tensors
from lora_deploy.tensors import DType

Part: TypeAlias = "tuple[int, memoryview]"
"""Where in the file some bytes go, and the bytes."""
_Array: TypeAlias = npt.NDArray[Any]
_Make: TypeAlias = Callable[[], memoryview]

BLOCK_BYTES = 1 << 22
"""Size of a block; a row along the first axis is never divided."""
_MAX_WORKERS = 4
_N_AHEAD = 4
"""Blocks that are made or being made and not taken yet, at most."""
_TILE = 128
"""Edge of the squares that a transposition goes by: one of them, and what it reads, stays in the nearest cache."""
_WIDENED = {(DType.BF16, DType.F32), (DType.F16, DType.F32)}
_NUMBERS: dict[DType, type[np.generic]] = {DType.F32: np.float32, DType.F16: np.float16, DType.F64: np.float64}
_BITS: dict[int, type[np.generic]] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def is_movable(slot: Slot, checkpoint: Checkpoint) -> bool:
    """Whether nothing is rounded on the way: the same format, or a wider one."""
    wanted = DType(slot.dtype)
    return sys.byteorder == "little" and all(
        (checkpoint.tensors[taken.tensor].dtype == wanted and not taken.plus)
        or (wanted is DType.F32 and checkpoint.tensors[taken.tensor].dtype is wanted)
        or (checkpoint.tensors[taken.tensor].dtype, wanted) in _WIDENED
        for taken in taken_tensors(slot.origin)
    )


def moved(checkpoint: Checkpoint, slots: Sequence[Slot], rest: Callable[[Slot], memoryview]) -> Iterator[Part]:
    """Give the bytes of slots in order, in parts; ``rest`` makes those that are not moved, each as a whole.

    Raises:
        ExportError: A tensor does not fit its place.
    """
    waiting: deque[tuple[int, Future[memoryview]]] = deque()
    n_workers = min(_MAX_WORKERS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2)
    with ThreadPoolExecutor(n_workers, "move") as workers:
        try:
            for slot in slots:
                for offset, make in _blocks(checkpoint, slot, rest):
                    waiting.append((offset, workers.submit(make)))
                    if len(waiting) > _N_AHEAD:
                        yield _taken(waiting)
            while waiting:
                yield _taken(waiting)
        finally:
            workers.shutdown(cancel_futures=True)


def _taken(waiting: deque[tuple[int, Future[memoryview]]]) -> Part:
    offset, future = waiting.popleft()
    return offset, future.result()


def _blocks(checkpoint: Checkpoint, slot: Slot, rest: Callable[[Slot], memoryview]) -> Iterator[tuple[int, _Make]]:
    """Cut a slot along its first axis: where each block goes, and how to make it."""
    if isinstance(slot.origin, Kept | Quantised) or not is_movable(slot, checkpoint):
        yield slot.offset, partial(rest, slot)
        return
    source = _source(checkpoint, slot.origin)
    n_rows, *others = slot.shape or (1,)
    row_bytes = DType(slot.dtype).n_bytes * math.prod(others)
    if n_rows * row_bytes != slot.n_bytes:
        raise ExportError(f"{slot.file}: byte {slot.offset}: {slot.n_bytes} bytes do not hold {list(slot.shape)}")
    step = max(1, BLOCK_BYTES // max(1, row_bytes))
    for first in range(0, n_rows if row_bytes else 0, step):
        shape = (min(step, n_rows - first), *others)
        yield slot.offset + first * row_bytes, partial(_block, source, DType(slot.dtype), shape, first)


def _block(source: _Source, dtype: DType, shape: tuple[int, ...], first: int) -> memoryview:
    if isinstance(source, _Tensor) and source.is_ready(dtype):
        return _bytes(source.values[first : first + shape[0]])
    out = np.empty(shape, _number(dtype))
    source.fill(out, first)
    return _bytes(out)


def _bytes(values: _Array) -> memoryview:
    return memoryview(values.reshape(-1).view(np.uint8).data)


@dataclass(frozen=True, slots=True, eq=False)
class _Tensor:
    """A stored tensor, seen in the shape that the graph wants; nothing is copied."""

    values: _Array
    dtype: DType
    plus: float

    def is_ready(self, wanted: DType) -> bool:
        """Whether its bytes lie in the wanted order already."""
        return self.dtype is wanted and not self.plus and self.values.flags.c_contiguous

    def fill(self, out: _Array, first: int) -> None:
        """Write rows from ``first`` on, as many as ``out`` has."""
        _copy(out, self.values[first : first + len(out)] if out.ndim else self.values.reshape(()))
        if self.plus:
            out += np.float32(self.plus)


@dataclass(frozen=True, slots=True, eq=False)
class _Joined:
    """Several sources, concatenated along an axis or stacked along a new one."""

    axis: int
    is_stack: bool
    parts: tuple[_Source, ...]
    lengths: tuple[int, ...]
    """Of the parts along the axis."""

    def fill(self, out: _Array, first: int) -> None:
        """Write rows from ``first`` on, as many as ``out`` has."""
        start = 0
        for part, length in zip(self.parts, self.lengths, strict=True):
            if self.axis:
                part.fill(out[(slice(None),) * self.axis + (self._place(start, length),)], first)
            else:
                self._fill_rows(out, part, start - first, length)
            start += length

    def _fill_rows(self, out: _Array, part: _Source, start: int, length: int) -> None:
        """Write what of a part, whose first row is row ``start`` of ``out``, lies within ``out``."""
        begin, end = max(0, start), min(len(out), start + length)
        if begin < end:
            part.fill(out[begin, ...] if self.is_stack else out[begin:end], 0 if self.is_stack else begin - start)

    def _place(self, start: int, length: int) -> int | slice:
        return start if self.is_stack else slice(start, start + length)


_Source: TypeAlias = "_Tensor | _Joined"


def _source(checkpoint: Checkpoint, origin: Origin) -> _Source:
    if isinstance(origin, Taken):
        return _tensor(checkpoint, origin)
    if not isinstance(origin, Joined):
        raise ExportError("a constant of the graph comes from no tensor, and what is packed is no copy of one")
    lengths = [1 if origin.is_stack else shape_of(part)[origin.axis] for part in origin.parts]
    parts = tuple(_source(checkpoint, part) for part in origin.parts)
    return _Joined(origin.axis, origin.is_stack, parts, tuple(lengths))


def _tensor(checkpoint: Checkpoint, taken: Taken) -> _Tensor:
    spec = checkpoint.tensors[taken.tensor]
    if math.prod(spec.shape) != math.prod(taken.shape):
        raise ExportError(
            f"{taken.tensor}: found shape {spec.shape}, the graph was made for {taken.shape}", code="shape"
        )
    checkpoint.fetch(taken.tensor, 0, spec.n_bytes)
    values: _Array = np.frombuffer(checkpoint.read(taken.tensor), _number(spec.dtype)).reshape(spec.shape)
    if taken.permutation is not None:
        values = values.transpose(taken.permutation)
    return _Tensor(values.reshape(taken.shape or (1,)), spec.dtype, taken.plus)


def _number(dtype: DType) -> type[np.generic]:
    """What numpy calls a format; where it has no name for one, its bits."""
    return _NUMBERS.get(dtype, _BITS[dtype.n_bytes])


def _copy(out: _Array, values: _Array) -> None:
    """Copy, widening where ``out`` is wider, and square by square where rows and columns change places."""
    if values.ndim < 2 or abs(values.strides[-1]) <= abs(values.strides[-2]):
        _assign(out, values)
    elif values.ndim == 2:
        _turn(out, values)
    elif values.shape[-1] >= _TILE <= values.shape[-2]:
        for target, matrix in zip(out, values, strict=True):
            _copy(target, matrix)
    else:
        _assign(out, values)


def _turn(out: _Array, values: _Array) -> None:
    """Copy a matrix whose columns lie in memory one after the other.

    Rows that are a power of two apart fall on the same few lines of the cache: so a square is brought together first.
    """
    square = np.empty((_TILE, _TILE), values.dtype)
    stored = values.T
    for row in range(0, stored.shape[0], _TILE):
        for column in range(0, stored.shape[1], _TILE):
            tile = stored[row : row + _TILE, column : column + _TILE]
            near = square[: tile.shape[0], : tile.shape[1]]
            near[...] = tile
            _assign(out[column : column + _TILE, row : row + _TILE], near.T)


def _assign(out: _Array, values: _Array) -> None:
    if out.dtype != np.float32 or values.dtype != np.uint16:
        out[...] = values
    else:  # a bfloat16 is the upper half of a float32
        np.left_shift(values, np.uint32(16), out=out.view(np.uint32), dtype=np.uint32)
