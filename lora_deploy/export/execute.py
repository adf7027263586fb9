"""Carry out an export: find or make the graphs, stream the weights, write the record, put the folder in place.

Promise (law 6): ``OUT`` is either what it was before or the finished export. The same command finds a finished one by
its digest and checks its files; another is refused without ``--fresh``, which replaces it only after success.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_deploy.artifact import Artifact, cached_sha256, remember_sha256
from lora_deploy.checkpoint import read_json
from lora_deploy.errors import ExportError, OutputExistsError
from lora_deploy.export.graphs import TABLE_NAME, GraphSet, graph_of, recorded_graph
from lora_deploy.export.plan import ExportPlan
from lora_deploy.export.record import (
    RECORD_NAME,
    SCHEMA,
    ExportRecord,
    RecordedQuantisation,
    compose,
    digest_of,
    read_record,
    recorded_findings,
)
from lora_deploy.export.shared import Shared, share
from lora_deploy.export.sources import CheckpointSource, components_of
from lora_deploy.export.weights import write_weights
from lora_deploy.merge.output import WORK_FOLDER, locked, publish, remove, tidy
from lora_deploy.merge.progress import Progress
from lora_deploy.merge.record import RecordedFile
from lora_deploy.safetensors_file import write_file


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Exported:
    """A finished export."""

    root: Path
    record: ExportRecord
    was_done: bool = False
    """Whether it was already there, complete and unchanged."""
    was_cached: bool = True
    """Whether the graphs were found in the cache."""

    @property
    def graphs(self) -> Mapping[str, Path]:
        """Graph files by component."""
        return {name: self.root / graph.file for name, graph in self.record.graphs.items()}


def default_output(plan: ExportPlan) -> Path:
    """Name the folder that an export goes to when nobody says."""
    source = plan.source
    if not isinstance(source, CheckpointSource):
        raise ExportError("an export from adapter and base needs a place", hint="-o OUT")
    if plan.options.storage == "shared":
        return source.checkpoint.root
    return source.checkpoint.root / (f"onnx-{plan.options.quantize}" if plan.options.quantize else "onnx")


def execute_export(plan: ExportPlan, out: Path, *, progress: Progress | None = None) -> Exported:
    """Write an export to ``out``; a link there is followed.

    Raises:
        ExportError: The graphs cannot be made or bound.
        OutputExistsError: Something else is at ``out``.
        MergeError: A value cannot be merged, or a file cannot be written.
    """
    root, out = out, out.resolve()
    identity = plan.identity(progress)
    digest = digest_of(identity)
    done = find_done(out, digest, plan)
    if done is not None:
        return Exported(root=root, record=done, was_done=True)
    graphs = graph_of(plan.blueprint, plan.maker, progress)
    if plan.options.storage == "shared":
        record = _write(plan, graphs, out, digest, identity, progress)
        return Exported(root=root, record=record, was_cached=graphs.was_cached)
    record = put_in_place(out, lambda folder: _write(plan, graphs, folder, digest, identity, progress))
    return Exported(root=root, record=record, was_cached=graphs.was_cached)


def put_in_place(out: Path, write: Callable[[Path], ExportRecord]) -> ExportRecord:
    """Have an export written to a folder beside ``out``, and put that in its place once it is whole.

    Raises:
        LoraDeployError: As ``write``; ``out`` is then what it was.
    """
    with locked(out) as partial:
        for path in partial.iterdir():
            if path.name != WORK_FOLDER:
                remove(path)
        record = write(partial)
        publish(partial, out)
    for file in record.artifacts:
        remember_sha256(out / file.path, file.sha256)
    tidy(out)
    return record


def find_done(out: Path, digest: str, plan: ExportPlan) -> ExportRecord | None:
    """Give the record of this very export if ``out`` holds it, unchanged; None if ``out`` may be written.

    Raises:
        OutputExistsError: Something else is there, and ``--fresh`` was not said.
        ExportError: Shared weights lie elsewhere.
    """
    is_shared = plan.options.storage == "shared"
    if is_shared and isinstance(plan.source, CheckpointSource) and out != plan.source.checkpoint.root.resolve():
        raise ExportError(
            f"{out}: onnxruntime reads shared weights only from the graph's own folder",
            hint=f"-o {plan.source.checkpoint.root}",
        )
    if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / RECORD_NAME).is_file():
        if is_shared:
            return None
        raise OutputExistsError(f"{out}: exists and is no export of ours", hint="choose another -o")
    record = read_record(out)
    problem = "holds another export"
    if record.digest == digest:
        changed = next((file.path for file in record.artifacts if not _is_intact(out / file.path, file.sha256)), None)
        if changed is None:
            return record
        problem = f"holds this export, but {changed} was changed or lost since"
    if plan.options.fresh:
        return None
    raise OutputExistsError(f"{out}: {problem}", hint="choose another -o, or replace it with --fresh")


def _is_intact(path: Path, sha256: str) -> bool:
    return path.is_file() and cached_sha256(path) == sha256


def _write(
    plan: ExportPlan,
    graphs: GraphSet,
    folder: Path,
    digest: str,
    identity: Mapping[str, Any],
    progress: Progress | None,
) -> ExportRecord:
    """Write graphs, weights, travelling files and at last the record."""
    shared, quantised = Shared.nothing(graphs), None
    if plan.options.storage == "shared":
        shared = share(plan.source, graphs)
    elif plan.quantisation is not None:
        from lora_deploy.export.quantise import quantise

        shared, quantised = quantise(graphs, plan.quantisation)
    artifacts = write_files(plan, graphs, shared, folder, progress)
    if quantised is not None:
        graphs = replace(graphs, graphs={n: recorded_graph(folder, graph.file) for n, graph in graphs.graphs.items()})
    record = record_of(plan, graphs, digest, identity, artifacts, shared_share=shared.share, quantised=quantised)
    write_record(folder, record, plan, graphs)
    return record


def write_files(
    plan: ExportPlan, graphs: GraphSet, shared: Shared, folder: Path, progress: Progress | None
) -> list[Artifact]:
    """Write weights, the graphs as they are in ``shared``, the table, and what travels: all but the record."""
    for graph in graphs.graphs.values():
        (folder / graph.file).parent.mkdir(parents=True, exist_ok=True)
    artifacts = write_weights(plan.source, graphs, shared.table, folder, progress)
    for name, content in shared.graphs.items():
        artifacts.append(write_file(folder / name, content, (), root=folder))
    artifacts.append(write_file(folder / TABLE_NAME, shared.table.text().encode(), (), root=folder))
    if plan.options.storage != "shared":
        artifacts += _travelling(plan, graphs, folder)
    return artifacts


def record_of(
    plan: ExportPlan,
    graphs: GraphSet,
    digest: str,
    identity: Mapping[str, Any],
    artifacts: Sequence[Artifact],
    *,
    shared_share: float = 0.0,
    quantised: RecordedQuantisation | None = None,
) -> ExportRecord:
    """Say what was exported from what."""
    return ExportRecord(
        schema=SCHEMA,
        digest=digest,
        blueprint=plan.blueprint.digest,
        source=dict(identity["source"]),
        origin=plan.source.origin(identity["source"]),
        options=plan.settings,
        opset=graphs.opset,
        graphs=dict(graphs.graphs),
        binding_table=TABLE_NAME,
        shared_share=shared_share,
        quantised=quantised,
        versions={**graphs.versions, **plan.quantisers},
        findings=recorded_findings((*plan.findings, *graphs.findings)),
        artifacts=tuple(RecordedFile(path=str(a.path), n_bytes=a.n_bytes, sha256=a.sha256) for a in sorted(artifacts)),
    )


def write_record(folder: Path, record: ExportRecord, plan: ExportPlan, graphs: GraphSet) -> None:
    """Write the record, with what the layout's loader wants to know."""
    components = dict(graphs.metadata) if plan.settings["layout"] == "transformers" else {}
    write_file(folder / RECORD_NAME, compose(record, components).encode(), (), root=folder)


def exported_config(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Give ``config.json`` of an export: the model's, with the format that the graphs compute in.

    Models of diffusers have no entry for that.
    """
    kept = {key: value for key, value in config.items() if key != "torch_dtype"}
    return kept if "_class_name" in config else {**kept, "dtype": dtype}


def _travelling(plan: ExportPlan, graphs: GraphSet, folder: Path) -> list[Artifact]:
    """Configuration, tokenizer or processor, generation settings, and what belongs to the graph."""
    components, dtype = components_of(plan.source), plan.dtype.long_name
    whole = plan.source.config
    config = {**whole, **{name: exported_config(whole[name], dtype) for name in components}}
    artifacts = []
    if not components:  # those of components lie beside their graphs
        config = exported_config(whole, dtype)
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        artifacts = [write_file(folder / "config.json", text.encode(), (), root=folder)]
    for name, path in sorted(plan.source.companions.items()):
        (folder / name).parent.mkdir(exist_ok=True)
        artifacts.append(write_file(folder / name, path.read_bytes(), (), root=folder))
    generation = plan.source.companions.get("generation_config.json")
    own = plan.maker.settled(
        {name: (graphs.folder / name).read_bytes() for name in graphs.companions},
        config,
        read_json(generation) if generation is not None else {},
    )
    return [*artifacts, *(write_file(folder / name, content, (), root=folder) for name, content in own.items())]
