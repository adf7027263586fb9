"""Replay a merge into an existing export: make every byte of its files again and compare.

Promise: nothing is compared on trust: what no adapter changes must be the base's byte, graphs included, and what one
changes is computed by the code that merges.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lora_deploy.checkpoint import contained_path
from lora_deploy.errors import MalformedCheckpointError
from lora_deploy.export.binding_table import Slot, taken_tensors
from lora_deploy.export.existing.base import OnnxBase, map_file
from lora_deploy.export.existing.form import OnnxForm
from lora_deploy.export.existing.plan import PatchedFile
from lora_deploy.merge.budget import fit
from lora_deploy.merge.local import chosen_device, local_workers
from lora_deploy.merge.plan import MergePlan
from lora_deploy.merge.progress import Progress, reporting


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Bytes of a file that are not what base and adapters give."""

    file: str
    message: str
    tensors: tuple[str, ...] = ()
    """Whose bytes they are; empty for bytes of no known tensor."""
    is_adapted: bool = False
    """Whether adapters change these tensors."""
    is_base: bool = False
    """Whether they do, and all bytes are the base's."""


def replay_existing(plan: MergePlan, folder: Path, progress: Progress | None = None) -> Iterator[Difference]:
    """Say what in a folder is not what the plan gives; nothing when all is.

    Raises:
        MemoryBudgetError: The plan's memory budget is too small.
        UnsafeFileError: A file of the folder is a link out of it.
    """
    base, form, footprint = plan.binding.checkpoint, OnnxForm(), fit(plan)
    assert isinstance(base, OnnxBase)  # noqa: S101 - the caller asked
    with (
        reporting(progress, "replaying the graphs' files", plan.n_bytes) as advance,
        local_workers(footprint.n_workers, footprint.n_ahead, chosen_device(plan.options.device)) as workers,
    ):
        for shard in plan.shards:
            assert isinstance(shard, PatchedFile)  # noqa: S101 - the plan has no others
            found = _stored(folder, shard)
            if isinstance(found, str):
                yield Difference(file=shard.file, message=found)
                continue
            places, start = _Places(base, shard), 0
            for view, _, _ in form.contents(plan, shard, workers, footprint.chunk_elements):
                places.compare(np.frombuffer(view, np.uint8), found[start : start + view.nbytes], start)
                start += view.nbytes
                advance(view.nbytes)
            yield from places.differences(found)


def _stored(folder: Path, shard: PatchedFile) -> NDArray[np.uint8] | str:
    """A file's bytes, or why it cannot be the planned one."""
    try:
        path = contained_path(folder, shard.file)
    except MalformedCheckpointError as error:
        return error.message
    size = path.stat().st_size
    if size != shard.n_bytes:
        return f"has {size} bytes, expected {shard.n_bytes}"
    content = map_file(path)
    return np.frombuffer(content if content is not None else b"", np.uint8)


class _Places:
    """Counts the differing bytes of a file by the slot that they lie in."""

    def __init__(self, base: OnnxBase, shard: PatchedFile) -> None:
        self._base, self._shard = base, shard
        self._slots = sorted((slot for slot in base.slots if slot.file == shard.file), key=lambda slot: slot.offset)
        self._starts = np.array([slot.offset for slot in self._slots], np.int64)
        self._found: dict[int, tuple[int, int]] = {}
        """By position of the slot, or -2 - position where it ends before: number of bytes, and the first."""

    def compare(self, expected: NDArray[np.uint8], found: NDArray[np.uint8], start: int) -> None:
        at = np.flatnonzero(expected != found) + start
        positions = np.searchsorted(self._starts, at, side="right") - 1
        for position in np.unique(positions):
            inside = at[positions == position]
            slot = self._slots[position] if position >= 0 else None
            end = slot.offset + slot.n_bytes if slot is not None else 0
            for key, part in ((int(position), inside[inside < end]), (-2 - int(position), inside[inside >= end])):
                if len(part):
                    number, first = self._found.get(key, (0, int(part[0])))
                    self._found[key] = (number + len(part), first)

    def differences(self, found: NDArray[np.uint8]) -> Iterator[Difference]:
        changed = {(slot.offset, slot.n_bytes) for slot in self._shard.slots}
        for key, (number, first) in sorted(self._found.items(), key=lambda item: item[1][1]):
            if key < 0:
                message = f"{number} bytes of no weight are not the base's, first byte {first}"
                yield Difference(file=self._shard.file, message=message)
                continue
            slot = self._slots[key]
            is_adapted = (slot.offset, slot.n_bytes) in changed
            wanted = "base and adapters give" if is_adapted else "the base has"
            yield Difference(
                file=self._shard.file,
                tensors=tuple(taken.tensor for taken in taken_tensors(slot.origin)),
                is_adapted=is_adapted,
                is_base=is_adapted and self._is_base(slot, found),
                message=f"{number} of {slot.n_bytes} bytes are not what {wanted}, first byte {first} of {slot.file}",
            )

    def _is_base(self, slot: Slot, found: NDArray[np.uint8]) -> bool:
        content = map_file(contained_path(self._base.root, slot.file))
        before = np.frombuffer(content if content is not None else b"", np.uint8)
        place = slice(slot.offset, slot.offset + slot.n_bytes)
        return np.array_equal(before[place], found[place])
