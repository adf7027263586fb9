"""What making a graph takes of disk and memory, asked for before anything is written.

Two synthetic checkpoints lie on disk, and some makers write the model once more, with each set of weights; in memory
are the model and the graph's own copy of its weights (SmolLM2 in float32: 0.54 GB of weights, 1.22 GB at the peak).
"""

from __future__ import annotations

from pathlib import Path

from lora_deploy.errors import ExportError
from lora_deploy.export.blueprint import Blueprint
from lora_deploy.merge.budget import available_bytes, free_disk_bytes

_ON_DISK = {"genai": 4}
_USUALLY_ON_DISK = 2
_IN_MEMORY = 2
"""Copies of the weights."""


def require_room(blueprint: Blueprint, folder: Path) -> None:
    """Check disk and memory for making a graph in ``folder``.

    Raises:
        ExportError: One of them is too small; codes ``disk-space`` and ``memory``.
    """
    n_bytes = sum(spec.n_bytes for spec in blueprint.specs.values())
    needed, free = _ON_DISK.get(blueprint.maker, _USUALLY_ON_DISK) * n_bytes, free_disk_bytes(folder)
    if free < needed:
        raise ExportError(
            f"{folder}: making the graph needs {needed:,} bytes of disk for a while, {free:,} are free",
            hint="free some space, or let LORA_DEPLOY_CACHE name a folder on a larger disk",
            code="disk-space",
        )
    needed, available = _IN_MEMORY * n_bytes, available_bytes()
    if available is not None and available < needed:
        raise ExportError(
            f"making the graph needs {needed:,} bytes of memory, the machine has {available:,} free",
            hint="make it on a larger machine, with the same versions, and copy $LORA_DEPLOY_CACHE/graphs from there",
            code="memory",
        )
