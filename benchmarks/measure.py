"""Run a command and take its wall time, CPU time and peak private memory."""

from __future__ import annotations

import os
import resource
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_POLL_S = 0.05
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One finished run of a command."""

    wall_s: float
    cpu_s: float
    """User and system time of the command and its children."""
    peak_private_bytes: int
    """Largest sum of anonymous resident memory over the command's processes, sampled every 50 ms."""


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
    for name in os.listdir("/proc"):  # noqa: PTH208 - names are enough
        try:
            if name.isdigit() and os.getsid(int(name)) == session:
                total += _anonymous(name)
        except OSError:
            continue  # it ended meanwhile
    return total


def _anonymous(process: str) -> int:
    with open(f"/proc/{process}/statm", "rb", buffering=0) as stream:  # noqa: PTH123 - so that watching costs nothing
        _, resident, shared, *_ = stream.read(256).split()
    return (int(resident) - int(shared)) * _PAGE_BYTES
