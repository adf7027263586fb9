"""What ``lora-deploy merge`` shows: a plan that nothing was written for, and a finished merge."""

from __future__ import annotations

import heapq
import shlex
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lora_deploy.cli.numbers import format_number, format_seconds, format_size
from lora_deploy.cli.patterns import summarise_names
from lora_deploy.cli.screen import Screen

if TYPE_CHECKING:
    from lora_deploy.merge.budget import Estimate
    from lora_deploy.merge.execute import Merged
    from lora_deploy.merge.plan import MergePlan
    from lora_deploy.merge.record import MergeRecord, RecordedTensor
    from lora_deploy.merge.tasks import TaskDone

TREATMENTS = ("merged", "replaced", "added", "cast", "untouched")
"""In the order of their weight for a reader; the names are those of ``Treatment``."""
N_SHOWN = 5


def show_plan(screen: Screen, plan: MergePlan, output: Path, estimate: Estimate) -> None:
    """Print what a merge would change and take."""
    names = {treatment: [t.spec.name for t in plan.tensors if t.treatment == treatment] for treatment in TREATMENTS}
    screen.publish(
        {
            "dry_run": True,
            "output": output,
            "base": plan.binding.checkpoint.ref,
            "counts": {treatment: len(found) for treatment, found in names.items()},
            "tensors": {treatment: found for treatment, found in names.items() if treatment != "untouched"},
            "files": {shard.file: shard.n_bytes for shard in plan.shards},
            "companions": plan.companions,
            "config_edits": plan.binding.config_edits,
            "estimate": estimate,
            "findings": plan.findings,
        }
    )
    screen.line(f"would write {output}: {_files(len(plan.shards))} of weights, {format_size(plan.n_bytes)}")
    for treatment, found in names.items():
        screen.line(f"{treatment}: {len(found)} tensors")
        if treatment in {"merged", "replaced", "added"}:
            screen.fields((str(number), pattern) for pattern, number in summarise_names(found))
    if plan.binding.config_edits:
        edits = ", ".join(f"{key}={value!r}" for key, value in plan.binding.config_edits.items())
        screen.line(f"config.json: {edits}")
    if plan.companions:
        screen.line(f"also travel: {', '.join(sorted(plan.companions))}")
    screen.fields(
        [
            ("peak memory", f"{format_size(estimate.peak_bytes)} of {format_size(estimate.allowed_bytes)} allowed"),
            ("disk", f"{format_size(estimate.n_output_bytes)} needed, {format_size(estimate.free_disk_bytes)} free"),
            ("time", f"about {format_seconds(estimate.seconds)}"),
        ]
    )
    screen.findings(plan.findings)


def show_task(screen: Screen, plan: MergePlan, done: TaskDone, output: Path) -> None:
    """Print what one task of several wrote, and what is left to do."""
    task, n_files = done.task, len(done.files)
    screen.publish(
        {
            "output": output,
            "task": {"index": task.index, "count": task.count},
            "files": done.files,
            "n_bytes": done.n_bytes,
            "n_files_of_all": len(plan.shards),
            "is_merged": done.is_merged,
        }
    )
    if done.is_merged:
        screen.line(f"{output}: was merged before, with the same inputs and options; its files are intact")
        return
    share = f"{n_files} of {len(plan.shards)} weight files, {format_size(done.n_bytes)}"
    screen.line(f"task {task.index} of {task.count}: {share}, are there")
    screen.line("next, when all tasks are done: the same command with --finalize in place of the task")


def show_merged(screen: Screen, merged: Merged) -> None:
    """Print what a merge did, how much of the update the dtype kept, what it took, and what to do next."""
    record = merged.record
    counts = _counts(record)
    ratios = _most(record, lambda tensor: tensor.ratio)
    losses = _most(record, lambda tensor: None if tensor.survival is None else -tensor.survival)
    n_bytes = sum(file.n_bytes for file in record.artifacts)
    underflowed = {name: tensor.n_underflowed for name, tensor in record.tensors.items() if tensor.n_underflowed}
    screen.publish(
        {
            "output": merged.root,
            "was_done": merged.was_done,
            "digest": record.digest,
            "counts": counts,
            "n_bytes": n_bytes,
            "largest_ratios": [{"tensor": name, "ratio": record.tensors[name].ratio} for name in ratios],
            "worst_survivals": [{"tensor": name, "survival": record.tensors[name].survival} for name in losses],
            "n_underflowed": sum(underflowed.values()),
            "artifacts": record.artifacts,
            "cost": record.cost,
            "findings": record.findings,
        }
    )
    if merged.was_done:
        screen.line(f"{merged.root}: was merged before, with the same inputs and options; its files are intact")
    else:
        screen.line(f"merged into {merged.root}")
    screen.fields(_summary(record, counts, n_bytes, underflowed))
    _show_tensors(screen, "largest updates", record, ratios)
    _show_tensors(screen, "least survival", record, losses)
    screen.line()
    screen.line(f"next: lora-deploy verify {shlex.quote(str(merged.root))}")


def _counts(record: MergeRecord) -> dict[str, int]:
    found = Counter(tensor.treatment for tensor in record.tensors.values())
    found["untouched"] += record.n_untouched
    return {treatment: found[treatment] for treatment in TREATMENTS}


def _most(record: MergeRecord, figure: Callable[[RecordedTensor], float | None]) -> list[str]:
    """Names of the few tensors with the largest figure, largest first."""
    figures = {name: found for name, tensor in record.tensors.items() if (found := figure(tensor)) is not None}
    return heapq.nlargest(N_SHOWN, figures, key=lambda name: figures[name])


def _summary(
    record: MergeRecord, counts: dict[str, int], n_bytes: int, underflowed: dict[str, int]
) -> Iterator[tuple[str, str]]:
    yield "tensors", ", ".join(f"{number} {treatment}" for treatment, number in counts.items())
    dtypes = Counter(tensor.dtype for tensor in record.tensors.values())
    if dtypes:
        yield "dtype", ", ".join(dtypes)
    survivals = [tensor.survival for tensor in record.tensors.values() if tensor.survival is not None]
    if survivals:
        yield "survival", f"{100 * sum(survivals) / len(survivals):.2f} % of an update on average"
    if underflowed:
        yield "underflow", f"{sum(underflowed.values())} values of {len(underflowed)} tensors became 0"
    cost = record.cost
    yield "output", f"{_files(len(record.artifacts))}, {format_size(n_bytes)}"
    yield "time", f"{format_seconds(cost.seconds)}, {format_size(n_bytes / max(cost.seconds, 1e-9))}/s, {cost.device}"
    peak = format_size(cost.peak_private_bytes)
    yield "peak memory", f"{peak} ({format_size(cost.planned_peak_bytes)} planned)"


def _show_tensors(screen: Screen, title: str, record: MergeRecord, names: list[str]) -> None:
    if not names:
        return
    screen.line()
    screen.table(
        [title, "‖Δ‖", "‖Δ‖/‖W‖", "survival"],
        [
            [
                name,
                format_number(record.tensors[name].delta_norm),
                format_number(record.tensors[name].ratio),
                _percent(record.tensors[name].survival),
            ]
            for name in names
        ],
    )


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2f} %"


def _files(number: int) -> str:
    return "1 file" if number == 1 else f"{number} files"
