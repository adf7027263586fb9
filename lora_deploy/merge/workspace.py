"""Where a worker computes: its device, its buffers, and the way there and back.

Promise: nothing here changes a number. On an accelerator each worker has a stream of its own and moves rows through
pinned memory, so that one worker's copies run while another computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

TILE_ELEMENTS = 1 << 17
"""Elements of a tile: its float64 values take 1 MiB, which fits the L2 cache of a server core."""
DEVICE_TILE_ELEMENTS = 1 << 20
"""Elements of a tile on an accelerator, where starting work costs more than memory: as many as a chunk has."""

_REDUCING = (
    "allow_fp16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_accumulation",
)


class Workspace:
    """Buffers and stream of one worker, reused from tile to tile; not shared between threads."""

    def __init__(self, device: torch.device, *, is_compiled: bool = False) -> None:
        self.device = device
        self.is_compiled = is_compiled and device.type == "cpu"
        """Whether 16-bit results are computed in one compiled pass where that can be."""
        self.tile_elements = TILE_ELEMENTS if device.type == "cpu" else DEVICE_TILE_ELEMENTS
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._views: dict[tuple[str, torch.dtype, int, int], Tensor] = {}
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def active(self) -> AbstractContextManager[object]:
        """Make this worker's stream the one that work is queued on."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def bring(self, rows: Tensor) -> Tensor:
        """Give rows of the CPU on the device."""
        if self._stream is None:
            return rows
        pinned = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True).copy_(rows)
        return pinned.to(self.device, non_blocking=True)

    def fetch(self, result: Tensor) -> Tensor:
        """Give a finished result on the CPU."""
        if self._stream is None or result.device.type == "cpu":
            return result
        pinned = torch.empty(result.shape, dtype=result.dtype, pin_memory=True)
        pinned.copy_(result, non_blocking=True)
        self._stream.synchronize()
        return pinned

    def take(self, use: str, dtype: torch.dtype, rows: int, cols: int) -> Tensor:
        """Give an uninitialised contiguous (rows, cols) buffer; the same use and dtype share memory."""
        key = (use, dtype, rows, cols)
        view = self._views.get(key)
        if view is None:
            buffer = self._buffers.get((use, dtype))
            if buffer is None or buffer.numel() < rows * cols:
                self._views = {}  # those of a smaller buffer would keep it
                buffer = torch.empty(rows * cols, dtype=dtype, device=self.device)
                self._buffers[use, dtype] = buffer
            view = self._views[key] = buffer[: rows * cols].view(rows, cols)
        return view

    def shrink(self) -> bool:
        """Drop all buffers and halve the tile, down to that of a CPU; whether there was anything to halve."""
        self._views, self._buffers = {}, {}
        halved = max(TILE_ELEMENTS, self.tile_elements // 2)
        has_shrunk, self.tile_elements = halved < self.tile_elements, halved
        return has_shrunk


@contextmanager
def full_precision() -> Iterator[None]:
    """Switch off everything that lets an accelerator round products or sums to fewer bits than asked for."""
    settings = torch.backends.cuda.matmul
    chosen: dict[str, object] = {name: False for name in _REDUCING if hasattr(settings, name)}
    chosen |= {"fp32_precision": "ieee"} if hasattr(settings, "fp32_precision") else {"allow_tf32": False}
    before = {name: getattr(settings, name) for name in chosen}
    try:
        for name, value in chosen.items():
            setattr(settings, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(settings, name, value)
