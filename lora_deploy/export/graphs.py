"""Graphs of bases: made once, kept in the cache under their blueprint's digest, found again in no time.

Promise: a graph in the cache is whole: it was made in a folder beside it and put in place by one rename. Of two
processes that want the same one, the second waits for the first's. ``$LORA_DEPLOY_CACHE/graphs`` may be deleted at any
time.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lora_deploy.artifact import cache_root, cached_sha256, sha256_of
from lora_deploy.checkpoint import open_checkpoint
from lora_deploy.errors import Finding, Severity
from lora_deploy.export.binding_table import BindingTable
from lora_deploy.export.blueprint import Blueprint, write_synthetic
from lora_deploy.export.canonical import canonical_digest, opset_of, ports_of
from lora_deploy.export.interface import GraphMaker, GraphTask
from lora_deploy.export.record import RecordedGraph, RecordedPort
from lora_deploy.export.sources import mapped
from lora_deploy.merge.output import is_same_file, remove
from lora_deploy.merge.progress import Progress, reporting
from lora_deploy.safetensors_file import sync_folder

TABLE_NAME = "binding_table.json"
_ABOUT_NAME = "graph.json"
_WORK_PREFIX = ".making-"
_LOCK_NAME = "lock"
_SEEDS = (20_251_125, 31_415_927)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GraphSet:
    """The graphs of one blueprint, in the cache."""

    folder: Path
    digest: str
    """Of the blueprint."""
    table: BindingTable
    metadata: Mapping[str, Mapping[str, Any]]
    """What the runtime's loader wants to know, by component."""
    graphs: Mapping[str, RecordedGraph]
    opset: int
    companions: tuple[str, ...]
    """Other files of the maker's."""
    versions: Mapping[str, str]
    findings: tuple[Finding, ...]
    was_cached: bool


def is_cached(blueprint: Blueprint) -> bool:
    """Whether the graph was made before."""
    return (_place(blueprint) / _ABOUT_NAME).is_file()


def _place(blueprint: Blueprint) -> Path:
    return cache_root() / "graphs" / blueprint.digest


def graph_of(blueprint: Blueprint, maker: GraphMaker, progress: Progress | None = None) -> GraphSet:
    """Find a graph in the cache, or make it and put it there.

    Raises:
        ExportError: It cannot be made, or cannot be bound to the weights.
    """
    place = _place(blueprint)
    found = _read(place, blueprint.digest, was_cached=True)
    if found is not None:
        return found
    place.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(place.parent)
    with _claimed(place, progress) as work:
        found = _read(place, blueprint.digest, was_cached=True)  # it may have been made while this process waited
        if found is not None:
            return found
        from lora_deploy.export.room import require_room

        require_room(blueprint, work)
        made = work / "graph"
        made.mkdir()
        _make(blueprint, maker, work, made, progress)
        sync_folder(made)
        if place.exists():
            place.rename(work / "broken")
        made.rename(place)
    found = _read(place, blueprint.digest, was_cached=False)
    assert found is not None, f"{place}: was just written"  # noqa: S101
    return found


@contextmanager
def _claimed(place: Path, progress: Progress | None) -> Iterator[Path]:
    """Hold the folder in which a graph is made; another process that makes the same one is waited for.

    The lock is the system's, which lets go when a process dies; so nobody takes the folder for abandoned meanwhile.
    """
    work = place.with_name(f"{_WORK_PREFIX}{place.name}")
    while True:
        try:
            work.mkdir(exist_ok=True)
            lock = os.open(work / _LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            continue  # the process that held it is tidying up
        try:
            _wait_for(lock, progress)
            if is_same_file(lock, work / _LOCK_NAME):
                try:
                    for left in [path for path in work.iterdir() if path.name != _LOCK_NAME]:
                        remove(left)  # a killed process's
                    yield work
                finally:
                    shutil.rmtree(work, ignore_errors=True)
                return
        finally:
            os.close(lock)


def _wait_for(lock: int, progress: Progress | None) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with reporting(progress, "waiting for another process that makes this graph", 0):
            fcntl.flock(lock, fcntl.LOCK_EX)


def _remove_abandoned(folder: Path) -> None:
    """Remove working folders of processes that were killed: they are as large as two checkpoints."""
    for work in folder.glob(f"{_WORK_PREFIX}*"):
        with suppress(OSError):  # held by a process that works there, or just begun or ended
            lock = os.open(work / _LOCK_NAME, os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(work, ignore_errors=True)
            finally:
                os.close(lock)


def _make(blueprint: Blueprint, maker: GraphMaker, work: Path, made: Path, progress: Progress | None) -> None:
    from lora_deploy.export.bind import Binder

    folders = (work / "first", work / "second")
    for folder, seed in zip(folders, _SEEDS, strict=True):
        write_synthetic(blueprint, folder, seed)
    first, second = (open_checkpoint(folder) for folder in folders)
    tensors = ({n: mapped(first, n) for n in first.tensors}, {n: mapped(second, n) for n in second.tensors})
    binder = Binder(tensors, made)
    task = GraphTask(
        checkpoints=folders,
        dtype=blueprint.dtype,
        provider=blueprint.provider,
        is_stored=blueprint.is_stored,
    )
    metadata: dict[str, Any] = {}
    findings: list[Finding] = []
    n_bytes = first.n_bytes
    with reporting(progress, "making the graph", 2 * n_bytes) as advance:
        for drawing in maker.draw(task):
            binder.take(drawing)
            metadata[drawing.component] = drawing.metadata
            findings += drawing.findings
            advance(n_bytes if len(metadata) == 1 else 0)
    companions = maker.companions(task)
    for name, content in companions.items():
        (made / name).write_bytes(content)
    table = binder.finish()
    (made / TABLE_NAME).write_text(table.text())
    about: dict[str, Any] = {
        "metadata": metadata,
        "graphs": {name: recorded_graph(made, part.file).model_dump() for name, part in table.components.items()},
        "opset": opset_of(made / next(iter(table.components.values())).file),
        "companions": sorted(companions),
        "versions": dict(blueprint.versions),
        "findings": [asdict(finding) for finding in findings],
    }
    about["files"] = {
        path.relative_to(made).as_posix(): sha256_of(path) for path in sorted(made.rglob("*")) if path.is_file()
    }
    (made / _ABOUT_NAME).write_text(json.dumps(about, indent=1, sort_keys=True))


def recorded_graph(folder: Path, file: str) -> RecordedGraph:
    """What a record says of a graph file of a folder.

    Raises:
        InputError: The file is no ONNX graph.
    """
    path = folder / file
    inputs, outputs = ([RecordedPort(name=n, dtype=d, shape=s) for n, d, s in ports] for ports in ports_of(path))
    return RecordedGraph(file=file, canonical=canonical_digest(path), inputs=tuple(inputs), outputs=tuple(outputs))


def _read(folder: Path, digest: str, *, was_cached: bool) -> GraphSet | None:
    try:
        about = json.loads((folder / _ABOUT_NAME).read_text())
        if any(cached_sha256(folder / name) != sha256 for name, sha256 in about["files"].items()):
            return None
        table = BindingTable.model_validate_json((folder / TABLE_NAME).read_text())
        findings = tuple(Finding(**{**f, "severity": Severity(f["severity"])}) for f in about["findings"])
        return GraphSet(
            folder=folder,
            digest=digest,
            table=table,
            metadata=about["metadata"],
            graphs={name: RecordedGraph.model_validate(graph) for name, graph in about["graphs"].items()},
            opset=about["opset"],
            companions=tuple(about["companions"]),
            versions=about["versions"],
            findings=findings,
            was_cached=was_cached,
        )
    except (OSError, ValueError, KeyError, TypeError, ValidationError):
        return None
