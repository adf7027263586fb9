"""The largest memory that this process ever had."""

from __future__ import annotations

from pathlib import Path


def peak_bytes() -> int:
    """Peak resident memory of this process, interpreter and libraries included.

    Linux: ``VmHWM``, because ``ru_maxrss`` of a child begins with its parent's.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
