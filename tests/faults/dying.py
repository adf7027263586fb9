"""Merges that die: at the n-th change of the file system, in the middle of a write, or when a signal comes.

Run in processes forked from a server that has imported the product already, so that dying is cheap.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

from lora_deploy.errors import LoraDeployError
from lora_deploy.merge.execute import execute
from lora_deploy.merge.tasks import Task, carry_out_task
from tests.merging import model_plan

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.faults.dying"])
DONE, REFUSED, INTERRUPTED = 0, 5, 130
_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "open"}


class Run:
    """One merge in a process of its own."""

    def __init__(self, here: Path, out: Path, *, die_at: int = 0, tear: bool = False, **options: Any) -> None:
        self.n_changes = CONTEXT.Value("i", 0)
        self.n_merged_bytes = CONTEXT.Value("q", 0)
        self.n_planned_bytes = CONTEXT.Value("q", 0)
        arguments = (here, out, die_at, tear, options, self.n_changes, self.n_merged_bytes, self.n_planned_bytes)
        self.process = CONTEXT.Process(target=_merge, args=arguments)
        self.process.start()

    def wait(self) -> int:
        """Give the exit code, negative for a signal."""
        self.process.join(60)
        assert self.process.exitcode is not None
        return self.process.exitcode

    def kill(self, number: signal.Signals = signal.SIGKILL) -> int:
        """Send a signal, if it still runs."""
        if self.process.is_alive():
            assert self.process.pid is not None
            os.kill(self.process.pid, number)
        return self.wait()


class _Counting:
    """Progress that adds up the bytes that were merged, and dawdles when asked to."""

    def __init__(self, n_merged: Synchronized[int], n_planned: Synchronized[int], pause_s: float) -> None:
        self.n_merged, self.n_planned, self.pause_s = n_merged, n_planned, pause_s
        self.is_merging = False

    def start(self, label: str, n_bytes: int, unit: str = "") -> None:
        self.is_merging = label == "merging"
        if self.is_merging:
            self.n_planned.value = n_bytes

    def advance(self, n_bytes: int) -> None:
        if self.is_merging:
            self.n_merged.value += n_bytes
            signal.sigtimedwait([], self.pause_s)

    def finish(self) -> None:
        pass


def _merge(
    here: Path,
    out: Path,
    die_at: int,
    tear: bool,
    options: dict[str, Any],
    n_changes: Synchronized[int],
    n_merged: Synchronized[int],
    n_planned: Synchronized[int],
) -> None:
    os.environ["LORA_DEPLOY_CACHE"] = str(here / "cache")
    pause_s, task = options.pop("pause_s", 0.0), options.pop("task", None)
    plan = model_plan(here, **options)
    _count_changes(out.parent, n_changes, die_at, tear)
    try:
        progress = _Counting(n_merged, n_planned, pause_s)
        if task is None:
            execute(plan, out, progress=progress)
        else:
            carry_out_task(plan, out, Task(index=task[0], count=task[1]), progress=progress)
    except LoraDeployError as error:
        sys.stderr.write(f"{error}\n")
        os._exit(REFUSED)
    except KeyboardInterrupt:
        os._exit(INTERRUPTED)
    os._exit(DONE)


def _count_changes(root: Path, n_changes: Synchronized[int], die_at: int, tear: bool) -> None:
    """Count what changes files below ``root``, and die right before the ``die_at``-th, or half way through a write."""

    def count() -> bool:
        n_changes.value += 1
        return n_changes.value == die_at

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event not in _CHANGES or (event == "open" and not int(args[2] or 0) & (os.O_WRONLY | os.O_RDWR)):
            return
        if str(root) in str(args[0]) and count():
            die()

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(descriptor: int, *rest: Any) -> Any:
            if count():
                if tear and rest:
                    call(descriptor, rest[0][: len(rest[0]) // 2])
                die()
            return call(descriptor, *rest)

        return counting

    sys.addaudithook(hook)
    os.write = counted(os.write)
    os.fsync = counted(os.fsync)
