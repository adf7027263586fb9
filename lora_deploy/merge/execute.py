"""Carry out a merge plan: shard by shard into ``OUT.partial``, then one rename.

Promise (law 6): a file that exists proves nothing. Each finished shard leaves a record of its own under the plan's
digest; the same command re-hashes it and goes on behind it. Another plan's remains are never touched without
``fresh``. Kill the process at any byte: what was good before is good after.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lora_deploy.artifact import Artifact, cached_sha256, remember_sha256, sha256_of
from lora_deploy.errors import MergeError, OutputExistsError
from lora_deploy.merge.budget import Footprint, fit, private_bytes, require_disk
from lora_deploy.merge.compose import compose_record
from lora_deploy.merge.exact import BlockFacts
from lora_deploy.merge.facts import TensorFacts
from lora_deploy.merge.identity import identify, identity_digest, name_difference
from lora_deploy.merge.local import Workers, chosen_device, local_workers
from lora_deploy.merge.plan import MergePlan, PlannedTensor, ShardPlan
from lora_deploy.merge.progress import Progress, reporting
from lora_deploy.merge.record import RECORD_NAME, MergeRecord, read_record
from lora_deploy.merge.shard import chunks
from lora_deploy.safetensors_file import sync_folder, write_file, writing_error

_IDENTITY_NAME = "plan.json"
_LOCK_NAME = "lock"
_WORK_FOLDER = ".work"
"""Folder inside ``OUT.partial`` for what is not part of the result."""


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


def execute(plan: MergePlan, out: Path, *, progress: Progress | None = None) -> Merged:
    """Write the merged checkpoint to ``out``.

    Raises:
        MemoryBudgetError, DiskSpaceError: Before any write.
        OutputExistsError: Something else is at ``out`` or at ``out.partial``.
        NonFiniteTensorError: A value cannot be merged or stored.
    """
    started = time.monotonic()
    device = chosen_device(plan.options.device)
    identity = identify(plan, progress)
    digest = identity_digest(identity)
    done = _already_done(out, digest, fresh=plan.options.fresh)
    if done is not None:
        return done
    footprint = fit(plan)
    partial = out.with_name(out.name + ".partial")
    with _opened(partial, out, identity, fresh=plan.options.fresh):
        finished = {shard.file: _finished(partial, shard, digest) for shard in plan.shards}
        rest = [shard for shard in plan.shards if finished[shard.file] is None]
        require_disk(out, sum(shard.n_bytes for shard in rest))
        peak = private_bytes()
        with (
            reporting(progress, "merging", sum(shard.n_bytes for shard in rest)) as advance,
            local_workers(footprint.n_workers, footprint.n_ahead, device) as workers,
        ):
            for shard in rest:
                result, shard_peak = _merge_shard(plan, shard, partial, workers, footprint, digest, advance)
                finished[shard.file] = result
                peak = max(peak, shard_peak)
        results = [result for result in finished.values() if result is not None]
        cost = {
            "seconds": time.monotonic() - started,
            "peak_private_bytes": peak,
            "planned_peak_bytes": footprint.peak_bytes,
            "n_workers": footprint.n_workers,
            "device": str(device),
        }
        record = _finish(plan, partial, results, identity, cost)
        _publish(partial, out)
    _remember(out, record)
    return Merged(root=out, record=record)


def _already_done(out: Path, digest: str, *, fresh: bool) -> Merged | None:
    if not os.path.lexists(out):
        return None
    if out.is_dir() and not any(out.iterdir()):
        return None
    if not (out / RECORD_NAME).is_file():
        raise OutputExistsError(f"{out}: exists and is no merge of ours", hint="choose another -o")
    record = read_record(out)
    if record.digest == digest:
        changed = next((file.path for file in record.artifacts if not _is_intact(out / file.path, file.sha256)), None)
        if changed is None:
            return Merged(root=out, record=record, was_done=True)
        problem = f"holds this merge, but {changed} was changed or lost since"
    else:
        problem = "holds another merge"
    if fresh:
        return None
    raise OutputExistsError(f"{out}: {problem}", hint="choose another -o, or replace it with --fresh")


def _is_intact(path: Path, sha256: str) -> bool:
    return path.is_file() and cached_sha256(path) == sha256


@contextmanager
def _opened(partial: Path, out: Path, identity: Mapping[str, Any], *, fresh: bool) -> Iterator[None]:
    """Make or resume the working folder, and hold it against a second process."""
    work = partial / _WORK_FOLDER
    if os.path.lexists(partial) and not work.is_dir():
        raise OutputExistsError(f"{partial}: exists and is no unfinished merge of ours", hint="choose another -o")
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = os.open(work / _LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise writing_error(partial, error) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OutputExistsError(f"{partial}: another process is merging there", hint="wait for it") from error
        _claim(partial, out, identity, fresh=fresh)
        try:
            yield
        except OSError as error:
            raise writing_error(partial, error) from error
    finally:
        os.close(lock)


def _claim(partial: Path, out: Path, identity: Mapping[str, Any], *, fresh: bool) -> None:
    """Mark the working folder as this plan's.

    Raises:
        OutputExistsError: It holds another plan's work, and ``fresh`` was not asked for.
    """
    marker = partial / _WORK_FOLDER / _IDENTITY_NAME
    text = json.dumps(identity, sort_keys=True, indent=1)
    if marker.exists():
        before = marker.read_text()
        if before == text:
            return
        if not fresh:
            raise OutputExistsError(
                f"{partial}: holds an unfinished merge that differs in {name_difference(before, identity)}",
                hint=f"finish it with its own options, delete it, choose another -o than {out}, or pass --fresh",
            )
    for path in partial.iterdir():
        if path.name != _WORK_FOLDER:
            _remove(path)
    for path in (partial / _WORK_FOLDER).iterdir():
        if path.name != _LOCK_NAME:
            _remove(path)
    _write_text(marker, text)


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
    partial: Path,
    workers: Workers,
    footprint: Footprint,
    digest: str,
    advance: Callable[[int], None],
) -> tuple[ShardResult, int]:
    facts: dict[str, BlockFacts] = {}
    peak = 0

    def data() -> Iterator[memoryview]:
        nonlocal peak
        parts = (
            chunk
            for tensor in shard.tensors
            for chunk in chunks(tensor, plan.binding.checkpoint, workers.device, footprint.chunk_elements)
        )
        for number, (chunk, view, seen) in enumerate(workers.evaluate(parts)):
            if chunk.compute is not None:
                facts.setdefault(chunk.tensor.spec.name, BlockFacts()).add(seen)
            if number % 16 == 0:
                peak = max(peak, private_bytes())
            yield view
            advance(view.nbytes)

    artifact = write_file(partial / shard.file, shard.header, data(), root=partial)
    if artifact.n_bytes != shard.n_bytes:
        raise MergeError(f"{shard.file}: wrote {artifact.n_bytes} bytes, planned {shard.n_bytes}")
    result = ShardResult(
        artifact=artifact,
        facts={name: TensorFacts.of(seen, _planned(shard, name)) for name, seen in facts.items()},
    )
    entry = {
        "plan": digest,
        "n_bytes": artifact.n_bytes,
        "sha256": artifact.sha256,
        "tensors": {name: tensor.to_json() for name, tensor in result.facts.items()},
    }
    _write_text(_shard_record_path(partial, shard), json.dumps(entry))
    return result, peak


def _planned(shard: ShardPlan, name: str) -> PlannedTensor:
    return next(tensor for tensor in shard.tensors if tensor.spec.name == name)


def _shard_record_path(partial: Path, shard: ShardPlan) -> Path:
    return partial / _WORK_FOLDER / f"{shard.file}.json"


def _finish(
    plan: MergePlan, partial: Path, results: list[ShardResult], identity: Mapping[str, Any], cost: Mapping[str, Any]
) -> MergeRecord:
    """Write everything but the weights: index, configuration, travelling files, and at last the record."""
    for path in partial.iterdir():
        if path.name != _WORK_FOLDER and path.name not in {shard.file for shard in plan.shards}:
            _remove(path)
    artifacts = [result.artifact for result in results]
    if len(plan.shards) > 1:
        artifacts.append(_write_json(partial, "model.safetensors.index.json", _index(plan)))
    if plan.config:
        artifacts.append(_write_json(partial, "config.json", plan.config))
    for name, source in sorted(plan.companions.items()):
        artifacts.append(_write_bytes(partial, name, source.read_bytes()))
    facts = {name: tensor for result in results for name, tensor in result.facts.items()}
    record = compose_record(plan, identity, sorted(artifacts), facts, cost)
    _write_text(partial / RECORD_NAME, record.text())
    return record


def _index(plan: MergePlan) -> dict[str, Any]:
    names = {tensor.spec.name: tensor.spec.file for tensor in plan.tensors}
    total = sum(tensor.spec.n_bytes for tensor in plan.tensors)
    n_elements = sum(tensor.spec.n_elements for tensor in plan.tensors)
    return {
        "metadata": {"total_parameters": n_elements, "total_size": total},
        "weight_map": dict(sorted(names.items())),
    }


def _publish(partial: Path, out: Path) -> None:
    """Put the finished folder in its place; what was there is removed only after that succeeded."""
    shutil.rmtree(partial / _WORK_FOLDER)
    sync_folder(partial)
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    replaces = os.path.lexists(out)
    if replaces:
        out.rename(old)
    partial.rename(out)
    sync_folder(out.parent)
    if replaces:
        _remove(old)


def _remember(out: Path, record: MergeRecord) -> None:
    for file in record.artifacts:
        remember_sha256(out / file.path, file.sha256)


def _write_json(folder: Path, name: str, value: Mapping[str, Any]) -> Artifact:
    return _write_bytes(folder, name, (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode())


def _write_bytes(folder: Path, name: str, content: bytes) -> Artifact:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_file(path, content, (), root=folder)


def _write_text(path: Path, text: str) -> None:
    write_file(path, text.encode(), (), root=path.parent)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
