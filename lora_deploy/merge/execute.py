"""Carry out a merge plan: shard by shard into ``OUT.partial``, then one rename.

Promise (law 6): a file that exists proves nothing. Each finished shard leaves a record of its own under the plan's
digest, written after the shard itself has reached the disk; the same command re-hashes it and goes on behind it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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
    seconds: float = 0.0
    peak_bytes: int = 0
    """Private memory of the process that wrote it, at most."""


def execute(plan: MergePlan, out: Path, *, form: Form | None = None, progress: Progress | None = None) -> Merged:
    """Write the merge to ``out``, as a checkpoint or in another form; a link there is followed.

    Raises:
        MemoryBudgetError, DiskSpaceError: Before any write.
        OutputExistsError: Something else is at ``out`` or at ``out.partial``.
        NonFiniteTensorError: A value cannot be merged or stored.
    """
    with begun(plan, out, form=form, progress=progress) as work:
        if isinstance(work, Merged):
            return work
        work.write(plan.shards, progress)
        return work.put_in_place()


@contextmanager
def begun(
    plan: MergePlan, out: Path, *, form: Form | None = None, progress: Progress | None = None
) -> Iterator[Work | Merged]:
    """Begin a merge: its folder is locked and claimed until this ends; the merge itself if it is done already.

    Raises:
        LoraDeployError: As ``execute``.
    """
    root, out = out, out.resolve()
    refuse_inputs_inside(plan, out)
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
                yield Work(
                    plan=plan,
                    form=form or SafetensorsForm(),
                    root=root,
                    out=out,
                    partial=partial,
                    identity=identity,
                    footprint=footprint,
                    device=device,
                )
                return
            abandon(partial)
    tidy(out)
    yield Merged(root=root, record=done, was_done=True)


@dataclass(kw_only=True, eq=False)
class Work:
    """A merge that was begun: shards are written in any portions, then the whole is put in place."""

    plan: MergePlan
    form: Form
    root: Path
    out: Path
    partial: Path
    identity: Mapping[str, Any]
    footprint: Footprint
    device: torch.device
    seconds: float = 0.0
    """Spent on shards so far."""
    _peak_bytes: int = field(default_factory=private_bytes)
    _results: list[ShardResult] = field(default_factory=list)

    def write(self, shards: Sequence[ShardPlan], progress: Progress | None = None) -> None:
        """Write some of the plan's shards; those that are there are checked instead."""
        started = time.monotonic()
        digest = identity_digest(self.identity)
        self._results += merge_shards(
            self.plan, shards, self.form, self.partial, digest, self.footprint, self.device, progress
        )
        self.seconds += time.monotonic() - started

    def put_in_place(self) -> Merged:
        """Finish what has all its shards."""
        cost = {
            "seconds": self.seconds,
            "peak_private_bytes": max([self._peak_bytes, *(result.peak_bytes for result in self._results)]),
            "planned_peak_bytes": self.footprint.peak_bytes,
            "n_workers": self.footprint.n_workers,
            "device": str(self.device),
        }
        record = finish(self.plan, self.form, self.partial, self._results, self.identity, cost)
        publish(self.partial, self.out)
        remember(self.out, record)
        return Merged(root=self.root, record=record)


def is_done(plan: MergePlan, out: Path, *, progress: Progress | None = None) -> bool:
    """Whether ``out`` holds this very merge already; nothing is written.

    Raises:
        OutputExistsError: As ``execute`` would.
    """
    out = out.resolve()
    refuse_inputs_inside(plan, out)
    has_record = (out / RECORD_NAME).is_file()
    digest = identity_digest(identify(plan, progress)) if has_record else ""
    return find_done(out, digest, fresh=plan.options.fresh) is not None


def refuse_inputs_inside(plan: MergePlan, out: Path) -> None:
    """Refuse an output that the merge reads from.

    Raises:
        OutputExistsError: Base or adapter lie in it.
    """
    binding = plan.binding
    for path in (binding.checkpoint.root, *(adapter.path for adapter in binding.adapters)):
        if any(path.resolve().is_relative_to(place) for place in (out, partial_of(out))):
            raise OutputExistsError(f"{out}: holds {path}, which this merge reads", hint="choose another -o")


def merge_shards(
    plan: MergePlan,
    shards: Sequence[ShardPlan],
    form: Form,
    partial: Path,
    digest: str,
    footprint: Footprint,
    device: torch.device,
    progress: Progress | None,
) -> list[ShardResult]:
    """Write the shards of these that are not there yet; give what all of them became, in their order."""
    finished = {shard.file: finished_shard(partial, shard, digest) for shard in shards}
    rest = [shard for shard in shards if finished[shard.file] is None]
    for shard in rest:
        (partial / shard.file).unlink(missing_ok=True)
    with (
        reporting(progress, "merging", sum(shard.n_bytes for shard in rest)) as advance,
        local_workers(footprint.n_workers, footprint.n_ahead, device, is_compiled=footprint.is_compiled) as workers,
    ):
        for shard in rest:
            finished[shard.file] = _merge_shard(
                plan, shard, form, partial, workers, footprint.chunk_elements, digest, advance
            )
    return [result for result in finished.values() if result is not None]


def finished_shard(partial: Path, shard: ShardPlan, digest: str) -> ShardResult | None:
    """Give the record of a shard that is really there, re-hashed; else None."""
    try:
        entry = json.loads(_shard_record_path(partial, shard).read_text())
        artifact = Artifact(PurePosixPath(shard.file), int(entry["n_bytes"]), str(entry["sha256"]))
        path = partial / shard.file
        if entry["plan"] != digest or path.stat().st_size != artifact.n_bytes or sha256_of(path) != artifact.sha256:
            return None
        facts = {name: TensorFacts.from_json(values) for name, values in entry["tensors"].items()}
        seconds, peak = float(entry["seconds"]), int(entry["peak_private_bytes"])
        return ShardResult(artifact=artifact, facts=facts, seconds=seconds, peak_bytes=peak)
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
) -> ShardResult:
    started = time.monotonic()
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
        seconds=time.monotonic() - started,
        peak_bytes=peak,
    )
    entry = {
        "plan": digest,
        "n_bytes": artifact.n_bytes,
        "sha256": artifact.sha256,
        "tensors": {name: tensor.to_json() for name, tensor in result.facts.items()},
        "seconds": result.seconds,
        "peak_private_bytes": result.peak_bytes,
    }
    write_text(_shard_record_path(partial, shard), json.dumps(entry))
    return result


def _shard_record_path(partial: Path, shard: ShardPlan) -> Path:
    return partial / WORK_FOLDER / f"{shard.file}.json"


def finish(
    plan: MergePlan,
    form: Form,
    partial: Path,
    results: Sequence[ShardResult],
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


def remember(out: Path, record: MergeRecord) -> None:
    """Keep the digests of what was just written, so that nobody reads it again to know them."""
    for file in record.artifacts:
        remember_sha256(out / file.path, file.sha256)


def _write_bytes(folder: Path, name: str, content: bytes) -> Artifact:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_file(path, content, (), root=folder)
