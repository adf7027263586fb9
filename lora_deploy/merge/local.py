"""Compute chunks on this machine: threads over row blocks, results in order, a bounded number ahead.

Promise: the order of the results is the order of the chunks, whatever finishes first; one torch thread a worker,
because that was measured faster than torch's own threads on blocks of this size.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext

import torch

from lora_deploy.errors import MergeError
from lora_deploy.merge.exact import BlockFacts
from lora_deploy.merge.shard import Chunk
from lora_deploy.merge.workspace import Workspace, full_precision


class Workers:
    """Threads that evaluate chunks, each with a workspace of its own."""

    def __init__(self, n_workers: int, n_ahead: int, device: torch.device, *, is_compiled: bool = False) -> None:
        self.n_ahead = n_ahead
        self.device = device
        self.is_compiled = is_compiled
        self._local = threading.local()
        self._pool = ThreadPoolExecutor(n_workers, "merge", initializer=torch.set_num_threads, initargs=(1,))

    def evaluate(self, chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, memoryview, BlockFacts]]:
        """Evaluate chunks, in order."""
        waiting: deque[tuple[Chunk, Future[tuple[memoryview, BlockFacts]] | None]] = deque()
        n_computing = 0
        for chunk in chunks:
            waiting.append((chunk, self._pool.submit(self._evaluate, chunk) if chunk.compute else None))
            n_computing += chunk.compute is not None
            while n_computing > self.n_ahead or (waiting and waiting[0][1] is None):
                n_computing -= waiting[0][1] is not None
                yield self._result(*waiting.popleft())
        while waiting:
            yield self._result(*waiting.popleft())

    def _result(
        self, chunk: Chunk, future: Future[tuple[memoryview, BlockFacts]] | None
    ) -> tuple[Chunk, memoryview, BlockFacts]:
        data, facts = future.result() if future is not None else (chunk.copied or memoryview(b""), BlockFacts())
        return chunk, data, facts

    def _evaluate(self, chunk: Chunk) -> tuple[memoryview, BlockFacts]:
        workspace = getattr(self._local, "workspace", None)
        if workspace is None:
            workspace = self._local.workspace = Workspace(self.device, is_compiled=self.is_compiled)
        return chunk.evaluate(workspace)

    def close(self) -> None:
        """Drop what has not begun and wait for what has."""
        self._pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def local_workers(
    n_workers: int, n_ahead: int, device: torch.device, *, is_compiled: bool = False
) -> Iterator[Workers]:
    """Start workers and stop them again, with torch's thread count and precision as they were.

    An accelerator gets two workers at least: one moves rows while the other computes.
    """
    n_threads = torch.get_num_threads()
    on_device = device.type != "cpu"
    with full_precision() if on_device else nullcontext():
        workers = Workers(max(n_workers, 2) if on_device else n_workers, n_ahead, device, is_compiled=is_compiled)
        try:
            yield workers
        finally:
            workers.close()
            torch.set_num_threads(n_threads)


def chosen_device(name: str) -> torch.device:
    """Resolve ``auto``, ``cpu``, ``cuda`` or ``cuda:i``.

    Raises:
        MergeError: The device does not exist here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise MergeError(f"device: found {name!r}, expected auto, cpu, cuda or cuda:i") from error
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        n_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
        raise MergeError(f"device {name}: this machine has {n_devices} CUDA devices", hint="--device cpu")
    if device.type not in {"cpu", "cuda"}:
        raise MergeError(f"device: found {name!r}, expected auto, cpu, cuda or cuda:i")
    return device
