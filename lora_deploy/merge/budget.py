"""What a merge will take: memory by the plan, disk, time; and the shape of the work that fits the budget.

Promise (law 5): ``peak_bytes`` bounds the private memory of the process, interpreter included, before the first byte is
written; it grows with the largest region's factors and the block size, not with the model.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from lora_deploy.errors import DiskSpaceError, MemoryBudgetError
from lora_deploy.merge.compiled import COMPILED_BYTES, pays
from lora_deploy.merge.plan import MergePlan, PlannedTensor
from lora_deploy.merge.shard import CHUNK_ELEMENTS, DEFINED_BLOCK_ELEMENTS
from lora_deploy.merge.workspace import TILE_ELEMENTS
from lora_deploy.safetensors_file import N_HASHED_BEHIND
from lora_deploy.tensors import Region
from lora_deploy.updates.interface import Update
from lora_deploy.updates.low_rank import LowRank

_DEFAULT_BUDGET_BYTES = 2_000_000_000
_SLACK_BYTES = 96_000_000
"""Allocator fragmentation, thread stacks, the small things."""
_TILE_BYTES = 40
"""Workspace bytes an element of a tile: float64 values and spread, two outputs, float32 and wide copies."""
_SETTLED_BYTES = 80
"""Bytes an element of a tile, should every one stay open: positions and values of up to two tiles, twice."""
_DEFINED_BYTES = 48
"""Bytes an element of a block of kinds defined in float64: a few float64 intermediates."""
_WHOLE_BYTES = 72
"""Bytes an element of a tensor that a factorisation needs whole: float64 input, factors, workspace."""
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_DISK_BYTES_PER_S = 350e6
_ELEMENTS_PER_S = 2.5e8
"""What one worker merges: 4 ns an element, measured on the machine of benchmarks/README.md."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """How the work is cut, and what it will take."""

    n_workers: int
    chunk_elements: int
    n_ahead: int
    """Chunks computed or waiting to be written at any time."""
    peak_bytes: int
    """Private memory, interpreter included."""
    is_compiled: bool
    """Whether 16-bit results are computed in one compiled pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A plan's cost, for a person to decide on."""

    n_output_bytes: int
    peak_bytes: int
    allowed_bytes: int
    """Memory budget that the peak stays within."""
    free_disk_bytes: int
    seconds: float
    """A rough estimate: bytes at a common disk's rate or elements at a common core's, whichever is slower."""


def private_bytes() -> int:
    """Anonymous resident memory of this process: what it holds and shares with nobody."""
    try:
        with open("/proc/self/statm", "rb", buffering=0) as stream:  # noqa: PTH123 - asked for often, and this is quick
            _, resident, shared, *_ = stream.read(256).split()
        return (int(resident) - int(shared)) * _PAGE_BYTES
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def fit(plan: MergePlan) -> Footprint:
    """Choose workers and chunk size within the memory budget.

    Raises:
        MemoryBudgetError: Even one worker with the smallest blocks needs more than the budget or than there is.
    """
    start = private_bytes()
    allowed = allowed_bytes(plan)
    most = plan.options.n_workers or usable_cores()
    cuts = [(most, CHUNK_ELEMENTS, False), (most, TILE_ELEMENTS, False), (1, TILE_ELEMENTS, False)]
    for n_workers, chunk, is_compiled in [(most, CHUNK_ELEMENTS, True), *cuts] if pays(plan) else cuts:
        n_ahead = 2 * n_workers + 1
        peak = start + _SLACK_BYTES + _work_bytes(plan, n_workers, chunk, n_ahead)
        if is_compiled:
            peak += COMPILED_BYTES
        footprint = Footprint(
            n_workers=n_workers, chunk_elements=chunk, n_ahead=n_ahead, peak_bytes=peak, is_compiled=is_compiled
        )
        if peak <= allowed:
            break
    else:
        raise MemoryBudgetError(
            f"the merge needs {footprint.peak_bytes:,} bytes of memory, --memory allows {allowed:,}",
            hint=f"--memory {footprint.peak_bytes / 1e9 + 0.1:.1f}GB",
        )
    available = available_bytes()
    if available is not None and footprint.peak_bytes - start > available:
        raise MemoryBudgetError(
            f"the merge needs {footprint.peak_bytes - start:,} more bytes of memory, the machine has {available:,} free"
        )
    return footprint


def allowed_bytes(plan: MergePlan) -> int:
    """The memory budget: what was asked for, else 2 GB beyond what the process holds already."""
    chosen = plan.options.memory_bytes
    return private_bytes() + _DEFAULT_BUDGET_BYTES if chosen is None else chosen


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def estimate(plan: MergePlan, out: Path) -> Estimate:
    """State what executing the plan will take.

    Raises:
        MemoryBudgetError: It does not fit the memory budget.
    """
    footprint = fit(plan)
    n_elements = sum(tensor.spec.n_elements for tensor in plan.tensors if tensor.updates)
    seconds = max(plan.n_bytes / _DISK_BYTES_PER_S, n_elements / _ELEMENTS_PER_S / footprint.n_workers)
    return Estimate(
        n_output_bytes=plan.n_bytes,
        peak_bytes=footprint.peak_bytes,
        allowed_bytes=allowed_bytes(plan),
        free_disk_bytes=free_disk_bytes(out),
        seconds=seconds,
    )


def free_disk_bytes(out: Path) -> int:
    """Free space where the output will lie; its nearest existing parent decides."""
    folder = out.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def require_disk(out: Path, n_bytes: int) -> None:
    """Check free space before the first byte.

    Raises:
        DiskSpaceError: Less is free than the output still needs.
    """
    free = free_disk_bytes(out)
    if free < n_bytes:
        raise DiskSpaceError(
            f"{out}: the merge still needs {n_bytes:,} bytes, {free:,} are free",
            hint="free some space or choose another -o",
        )


def _work_bytes(plan: MergePlan, n_workers: int, chunk_elements: int, n_ahead: int) -> int:
    widest = max((_n_cols(tensor) for tensor in plan.tensors), default=1)
    chunk = max(chunk_elements, widest)
    widest_element = max((tensor.spec.dtype.n_bytes for tensor in plan.tensors), default=1)
    tile = max(TILE_ELEMENTS, widest)
    exact = (n_ahead + 1 + N_HASHED_BEHIND) * chunk * widest_element + n_workers * tile * (_TILE_BYTES + _SETTLED_BYTES)
    largest_factors = max((_factor_bytes(tensor) for tensor in plan.tensors), default=0)
    defined = max((_defined_bytes(tensor, n_workers) for tensor in plan.tensors), default=0)
    return exact + 2 * largest_factors + defined + plan.n_whole_bytes


def _n_cols(tensor: PlannedTensor) -> int:
    return Region.whole(tensor.spec.shape).n_cols if tensor.updates else 1


def _factor_bytes(tensor: PlannedTensor) -> int:
    """Float64 copies of the factors of a tensor's largest region."""
    sizes: dict[Region | None, int] = {}
    for entry in tensor.updates:
        if isinstance(entry.update, LowRank):
            sizes[entry.region] = sizes.get(entry.region, 0) + 8 * entry.update.n_elements
    return max(sizes.values(), default=0)


def _defined_bytes(tensor: PlannedTensor, n_workers: int) -> int:
    defined = [
        entry.update for entry in tensor.updates if isinstance(entry.update, Update) and not entry.update.is_exact
    ]
    if not defined:
        return 0
    block = max(DEFINED_BLOCK_ELEMENTS, _n_cols(tensor)) * _DEFINED_BYTES * n_workers
    whole = _WHOLE_BYTES * tensor.spec.n_elements if any(update.needs_whole for update in defined) else 0
    prepared = sum(update.n_prepared_bytes for update in defined)
    return block + whole + prepared


def available_bytes() -> int | None:
    """Memory that the machine could still give; None where it does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
