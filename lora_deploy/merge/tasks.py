"""A merge in tasks: each writes its share of the shards, wherever it runs; at last one checks them all and finishes.

Tasks share nothing but the output's file system. Task i of n has shards i, i + n, i + 2n …; a shard and its record come
by rename, so that a task may be killed, run twice at once, or write late: all write the same bytes.

Promise: ``finalize`` puts nothing in place unless every shard is there with the digest that its record says.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lora_deploy.errors import MergeError, RecipeError
from lora_deploy.merge.budget import fit, private_bytes, require_disk
from lora_deploy.merge.execute import (
    Merged,
    finish,
    finished_shard,
    merge_shards,
    refuse_inputs_inside,
    remember,
)
from lora_deploy.merge.form import Form, SafetensorsForm
from lora_deploy.merge.identity import identify, identity_digest
from lora_deploy.merge.local import chosen_device
from lora_deploy.merge.output import abandon, claim, find_done, is_claimed, join, locked, publish, shared, tidy
from lora_deploy.merge.plan import MergePlan, ShardPlan
from lora_deploy.merge.progress import Progress

_MAX_LISTED = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Which share of the work."""

    index: int
    """From 0."""
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise RecipeError(f"task {self.index} of {self.count}: expected an index from 0 to {self.count - 1}")

    def share(self, plan: MergePlan) -> tuple[ShardPlan, ...]:
        """Give the shards that are this task's."""
        return plan.shards[self.index :: self.count]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskDone:
    """What became of one task."""

    task: Task
    files: tuple[str, ...]
    """Its shards, all of which are there now."""
    n_bytes: int
    is_merged: bool = False
    """Whether the whole merge is in place already, so that there was nothing to do."""


def carry_out_task(
    plan: MergePlan, out: Path, task: Task, *, form: Form | None = None, progress: Progress | None = None
) -> TaskDone:
    """Write the shards of one task to ``out.partial``; those that are there are checked instead.

    Raises:
        MemoryBudgetError, DiskSpaceError: Before any write.
        OutputExistsError: Something else is at ``out`` or at ``out.partial``.
        NonFiniteTensorError: A value cannot be merged or stored.
    """
    out = out.resolve()
    refuse_inputs_inside(plan, out)
    device = chosen_device(plan.options.device)
    identity = identify(plan, progress)
    digest = identity_digest(identity)
    shards = task.share(plan)
    files, n_bytes = tuple(shard.file for shard in shards), sum(shard.n_bytes for shard in shards)
    if find_done(out, digest, fresh=plan.options.fresh) is not None:
        return TaskDone(task=task, files=files, n_bytes=n_bytes, is_merged=True)
    footprint = fit(plan)
    with shared(out) as partial:
        join(partial, identity)
        require_disk(out, sum(shard.n_bytes for shard in shards if not (partial / shard.file).exists()))
        merge_shards(plan, shards, form or SafetensorsForm(), partial, digest, footprint, device, progress)
    return TaskDone(task=task, files=files, n_bytes=n_bytes)


def finalize(plan: MergePlan, out: Path, *, form: Form | None = None, progress: Progress | None = None) -> Merged:
    """Check the shards of all tasks, write what belongs beside them, and put the merge in place.

    Raises:
        MergeError: Shards are missing or damaged: those tasks must run again.
        OutputExistsError: Something else is at ``out`` or ``out.partial``, or a task is still at work.
    """
    root, out = out, out.resolve()
    refuse_inputs_inside(plan, out)
    identity = identify(plan, progress)
    digest = identity_digest(identity)
    done = find_done(out, digest, fresh=plan.options.fresh)
    if done is not None:
        tidy(out)
        return Merged(root=root, record=done, was_done=True)
    with locked(out) as partial:
        if is_claimed(partial):
            join(partial, identity)
        found = {shard.file: finished_shard(partial, shard, digest) for shard in plan.shards}
        missing = [file for file, result in found.items() if result is None]
        if missing:
            abandon(partial)
            listed = ", ".join(missing[:_MAX_LISTED]) + (" …" if len(missing) > _MAX_LISTED else "")
            raise MergeError(
                f"{out}: {len(missing)} of {len(found)} weight files are missing or damaged: {listed}",
                hint="run the tasks that write them again, then --finalize",
                code="shards-missing",
            )
        claim(partial, identity, set(found), fresh=False)
        results = [result for result in found.values() if result is not None]
        footprint = fit(plan)
        cost = {
            "seconds": sum(result.seconds for result in results),
            "peak_private_bytes": max([private_bytes(), *(result.peak_bytes for result in results)]),
            "planned_peak_bytes": footprint.peak_bytes,
            "n_workers": footprint.n_workers,
            "device": str(chosen_device(plan.options.device)),
        }
        record = finish(plan, form or SafetensorsForm(), partial, results, identity, cost)
        publish(partial, out)
    remember(out, record)
    return Merged(root=root, record=record)
