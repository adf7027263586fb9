"""What the user may choose about a merge. No tensor library is imported."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeOptions:
    """Options of planning and executing a merge."""

    dtype: str = "float16"
    """``float16``, ``bfloat16``, ``float32``, or ``base``: each tensor keeps its own."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda`` or ``cuda:i``: where low-rank sums are computed; the bytes are the same."""
    max_shard_bytes: int = 5_000_000_000
    memory_bytes: int | None = None
    """Private memory of this process that the plan may use, interpreter included; None is 2 GB beyond what the process
    holds already."""
    n_workers: int | None = None
    """Threads that compute row blocks; None is the number of usable cores."""
    fresh: bool = False
    """Replace a finished or unfinished other merge at the output, after this one succeeded."""
