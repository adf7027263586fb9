"""Run a command and take its wall time, CPU time and peak private memory."""

from __future__ import annotations

import os
import resource
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_POLL_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One finished run of a command."""

    wall_s: float
    cpu_s: float
    """User and system time of the command and its children."""
    peak_private_bytes: int
    """Largest sum of anonymous resident memory over the command's processes, sampled every 20 ms."""


def measure(command: Sequence[str], log: Path, environment: dict[str, str] | None = None) -> Run:
    """Run a command to its end.

    Raises:
        subprocess.CalledProcessError: It failed; what it printed is in ``log``.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    peak = 0
    with log.open("ab") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=stream, env=os.environ | (environment or {}), start_new_session=True
        )
        while process.poll() is None:
            peak = max(peak, _private_bytes(process.pid))
            time.sleep(_POLL_S)
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Run(wall_s=wall, cpu_s=cpu, peak_private_bytes=peak)


def _private_bytes(session: int) -> int:
    total = 0
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            if os.getsid(int(status.parent.name)) == session:
                total += _anonymous(status.read_text())
        except OSError:
            continue  # it ended meanwhile
    return total


def _anonymous(status: str) -> int:
    for line in status.splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0
