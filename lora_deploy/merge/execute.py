"""Carry out a merge plan: shard by shard into ``OUT.partial``, then one rename.

Promise (law 6): a file that exists proves nothing. Each finished shard leaves a record of its own under the plan's
digest, written after the shard itself has reached the disk; the same command re-hashes it and goes on behind it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from lora_deploy.artifact import Artifact, remember_sha256, sha256_of
from lora_deploy.errors import MergeError, OutputExistsError
from lora_deploy.merge.budget import Footprint, fit, private_bytes, require_disk
from lora_deploy.merge.compose import compose_record
from lora_deploy.merge.exact import BlockFacts
from lora_deploy.merge.facts import TensorFacts
from lora_deploy.merge.form import Form, SafetensorsForm
from lora_deploy.merge.identity import identify, identity_digest
from lora_deploy.merge.layout import config_files
from lora_deploy.merge.local import Workers, chosen_device, local_workers
from lora_deploy.merge.output import (
    WORK_FOLDER,
    abandon,
    claim,
    find_done,
    folder_bytes,
    locked,
    partial_of,
    publish,
    tidy,
    write_text,
)
from lora_deploy.merge.plan import MergePlan, PlannedTensor, ShardPlan
from lora_deploy.merge.progress import Progress, reporting
from lora_deploy.merge.record import RECORD_NAME, MergeRecord, RecordedFile
from lora_deploy.safetensors_file import write_file

_CHUNKS_A_SAMPLE = 8
"""Memory is looked at once in so many chunks: asking takes the interpreter's lock from the workers."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Merged:
    """A finished merge."""

    root: Path
    record: MergeRecord
    was_done: bool = False
    """Whether the output was already there, complete and unchanged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardResult:
    """A finished shard: its file and what its tensors became."""

    artifact: Artifact
    facts: Mapping[str, TensorFacts]


def execute(plan: MergePlan, out: Path, *, form: Form | None = None, progress: Progress | None = None) -> Merged:
    """Write the merge to ``out``, as a checkpoint or in another form; a link there is followed.

    Raises:
        MemoryBudgetError, DiskSpaceError: Before any write.
        OutputExistsError: Something else is at ``out`` or at ``out.partial``.
        NonFiniteTensorError: A value cannot be merged or stored.
    """
    root, out = out, out.resolve()
    _refuse_inputs_inside(plan, out)
    device = chosen_device(plan.options.device)
    identity = identify(plan, progress)
    digest = identity_digest(identity)
    done = find_done(out, digest, fresh=plan.options.fresh)
    if done is None:
        footprint = fit(plan)
        require_disk(out, plan.n_bytes - folder_bytes(partial_of(out)))
        with locked(out) as partial:
            done = find_done(out, digest, fresh=plan.options.fresh)  # by now another process may have finished it
            if done is None:
                claim(partial, identity, {shard.file for shard in plan.shards}, fresh=plan.options.fresh)
                record = _carry_out(plan, form or SafetensorsForm(), partial, identity, footprint, device, progress)
                publish(partial, out)
                _remember(out, record)
                return Merged(root=root, record=record)
            abandon(partial)
    tidy(out)
    return Merged(root=root, record=done, was_done=True)


def is_done(plan: MergePlan, out: Path, *, progress: Progress | None = None) -> bool:
    """Whether ``out`` holds this very merge already; nothing is written.

    Raises:
        OutputExistsError: As ``execute`` would.
    """
    out = out.resolve()
    _refuse_inputs_inside(plan, out)
    has_record = (out / RECORD_NAME).is_file()
    digest = identity_digest(identify(plan, progress)) if has_record else ""
    return find_done(out, digest, fresh=plan.options.fresh) is not None


def _refuse_inputs_inside(plan: MergePlan, out: Path) -> None:
    binding = plan.binding
    for path in (binding.checkpoint.root, *(adapter.path for adapter in binding.adapters)):
        if any(path.resolve().is_relative_to(place) for place in (out, partial_of(out))):
            raise OutputExistsError(f"{out}: holds {path}, which this merge reads", hint="choose another -o")


def _carry_out(
    plan: MergePlan,
    form: Form,
    partial: Path,
    identity: Mapping[str, Any],
    footprint: Footprint,
    device: torch.device,
    progress: Progress | None,
) -> MergeRecord:
    started, peak = time.monotonic(), private_bytes()
    digest = identity_digest(identity)
    finished = {shard.file: _finished(partial, shard, digest) for shard in plan.shards}
    rest = [shard for shard in plan.shards if finished[shard.file] is None]
    for shard in rest:
        (partial / shard.file).unlink(missing_ok=True)
    with (
        reporting(progress, "merging", sum(shard.n_bytes for shard in rest)) as advance,
        local_workers(footprint.n_workers, footprint.n_ahead, device, is_compiled=footprint.is_compiled) as workers,
    ):
        for shard in rest:
            result, shard_peak = _merge_shard(
                plan, shard, form, partial, workers, footprint.chunk_elements, digest, advance
            )
            finished[shard.file] = result
            peak = max(peak, shard_peak)
    cost = {
        "seconds": time.monotonic() - started,
        "peak_private_bytes": peak,
        "planned_peak_bytes": footprint.peak_bytes,
        "n_workers": footprint.n_workers,
        "device": str(device),
    }
    return _finish(plan, form, partial, [result for result in finished.values() if result is not None], identity, cost)


def _finished(partial: Path, shard: ShardPlan, digest: str) -> ShardResult | None:
    """The record of a shard that is really there, re-hashed; else None."""
    try:
        entry = json.loads(_shard_record_path(partial, shard).read_text())
        artifact = Artifact(PurePosixPath(shard.file), int(entry["n_bytes"]), str(entry["sha256"]))
        path = partial / shard.file
        if entry["plan"] != digest or path.stat().st_size != artifact.n_bytes or sha256_of(path) != artifact.sha256:
            return None
        facts = {name: TensorFacts.from_json(values) for name, values in entry["tensors"].items()}
        return ShardResult(artifact=artifact, facts=facts)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _merge_shard(
    plan: MergePlan,
    shard: ShardPlan,
    form: Form,
    partial: Path,
    workers: Workers,
    chunk_elements: int,
    digest: str,
    advance: Callable[[int], None],
) -> tuple[ShardResult, int]:
    facts: dict[str, tuple[PlannedTensor, BlockFacts]] = {}
    peak = 0

    def data() -> Iterator[memoryview]:
        nonlocal peak
        for number, (view, tensor, seen) in enumerate(form.contents(plan, shard, workers, chunk_elements)):
            if tensor is not None:
                facts.setdefault(tensor.spec.name, (tensor, BlockFacts()))[1].add(seen)
            if number % _CHUNKS_A_SAMPLE == 0:
                peak = max(peak, private_bytes())
            yield view
            advance(view.nbytes)

    for path in (partial / shard.file, _shard_record_path(partial, shard)):
        path.parent.mkdir(parents=True, exist_ok=True)
    artifact = write_file(partial / shard.file, shard.header, data(), root=partial)
    if artifact.n_bytes != shard.n_bytes:
        raise MergeError(f"{shard.file}: wrote {artifact.n_bytes} bytes, planned {shard.n_bytes}")
    result = ShardResult(
        artifact=artifact,
        facts={name: TensorFacts.of(seen, tensor) for name, (tensor, seen) in facts.items()},
    )
    entry = {
        "plan": digest,
        "n_bytes": artifact.n_bytes,
        "sha256": artifact.sha256,
        "tensors": {name: tensor.to_json() for name, tensor in result.facts.items()},
    }
    write_text(_shard_record_path(partial, shard), json.dumps(entry))
    return result, peak


def _shard_record_path(partial: Path, shard: ShardPlan) -> Path:
    return partial / WORK_FOLDER / f"{shard.file}.json"


def _finish(
    plan: MergePlan,
    form: Form,
    partial: Path,
    results: list[ShardResult],
    identity: Mapping[str, Any],
    cost: Mapping[str, Any],
) -> MergeRecord:
    """Write everything but the weights: configuration, travelling files, the form's own, and at last the record."""
    artifacts = [result.artifact for result in results]
    for name, content in config_files(plan.config, plan.binding.checkpoint):
        if name not in plan.companions:
            artifacts.append(_write_bytes(partial, name, content))
    for name, source in sorted(plan.companions.items()):
        artifacts.append(_write_bytes(partial, name, source.read_bytes()))
    written = tuple(RecordedFile(path=str(a.path), n_bytes=a.n_bytes, sha256=a.sha256) for a in sorted(artifacts))
    artifacts += [_write_bytes(partial, name, content) for name, content in form.others(plan, written).items()]
    facts = {name: tensor for result in results for name, tensor in result.facts.items()}
    record = compose_record(plan, identity, sorted(artifacts), facts, cost)
    write_text(partial / RECORD_NAME, record.text())
    return record


def _remember(out: Path, record: MergeRecord) -> None:
    for file in record.artifacts:
        remember_sha256(out / file.path, file.sha256)


def _write_bytes(folder: Path, name: str, content: bytes) -> Artifact:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_file(path, content, (), root=folder)
