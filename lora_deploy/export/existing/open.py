"""Open an existing export as a base: find its graphs, locate and explain their weights.

Our own exports say in their binding table where every initializer comes from; of the others the graphs themselves and
their names are read.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lora_deploy.artifact import cached_sha256
from lora_deploy.checkpoint import CheckpointRef, contained_path, has_weights, read_json
from lora_deploy.errors import Finding, InputError, MalformedCheckpointError, Severity
from lora_deploy.export.binding_table import BindingTable, Slot, taken_tensors
from lora_deploy.export.canonical import load_graph
from lora_deploy.export.existing.base import (
    OnnxBase,
    Stored,
    is_restorable,
    map_file,
    stored_array,
    views_of,
)
from lora_deploy.export.existing.explain import Explained, GraphFile, explain
from lora_deploy.export.existing.runs import refuse_overlaps, runs_of
from lora_deploy.export.graphs import TABLE_NAME
from lora_deploy.export.record import RECORD_NAME, read_record
from lora_deploy.export.replay import misplaced, read_table
from lora_deploy.tensors import DType, TensorSpec

_SUBFOLDER = "onnx"
_CONFIG_NAME = "config.json"
_BUILDERS_CONFIG = "genai_config.json"
_TRAVELLING = (RECORD_NAME, TABLE_NAME, _BUILDERS_CONFIG, _CONFIG_NAME, "ort_config.json", "quantize_config.json")
_LORA_MARKS = ("lora_a", "lora_b", "lora_down", "lora_up")


def is_onnx_base(reference: str | os.PathLike[str]) -> bool:
    """Whether a base is a graph, or a folder that has graphs and no weights of a checkpoint."""
    path = Path(reference).expanduser()
    return _is_graph(path) or (path.is_dir() and not has_weights(path) and bool(_graphs_in(path)))


def open_onnx_base(reference: str | os.PathLike[str], files: Sequence[str] | None = None) -> OnnxBase:
    """Open a graph with those that share its weights, or all graphs of a folder; ``files`` limits it to some.

    Raises:
        InputError: A graph cannot be read, or takes adapters as inputs.
        MalformedCheckpointError: Weights are missing, too short, or overlap.
        UnsafeFileError: A graph's weights are said to be outside its folder.
        ExportError: The package onnx is missing.
    """
    path = Path(reference).expanduser()
    found = [path] if _is_graph(path) else _graphs_in(path)
    if not found:
        raise MalformedCheckpointError(f"{path}: there is no graph any more")
    folder = found[0].parent
    if files is None:
        files = _sharing(path) if _is_graph(path) else [graph.name for graph in found]
    graphs = [_graph(folder, name) for name in files]
    config = _config(folder)
    table = _own_table(folder, graphs)
    refuse_overlaps(folder, [run for graph in graphs for run in graph.runs.values()])
    findings: list[Finding] = []
    if table is not None:
        explained = [Explained(slot=slot) for slot in table.slots if is_restorable(slot.origin)]
    else:
        explained, findings = explain(graphs, config or _builders_config(folder))
    files = [*(graph.file for graph in graphs), *(run.file for graph in graphs for run in graph.runs.values())]
    files += table.files if table is not None else ()
    tensors, views, slots = _tensors(folder, explained, findings)
    names = [name for name in _TRAVELLING if (folder / name).is_file() and (table is None or name != RECORD_NAME)]
    return OnnxBase(
        root=folder,
        ref=CheckpointRef(name=str(reference)),
        config=config,
        tensors=tensors,
        data_starts=dict.fromkeys(files, 0),
        graphs=tuple(graph.file for graph in graphs),
        slots=slots,
        views=views,
        aliases=tuple(entry.aliases for entry in explained if len(entry.aliases) > 1),
        is_own=table is not None,
        travelling={name: contained_path(folder, name) for name in names},
        findings=tuple(findings),
        is_out_in=not config,
    )


def _is_graph(path: Path) -> bool:
    return path.suffix == ".onnx" and path.is_file()


def _graphs_in(folder: Path) -> list[Path]:
    """Graph files of a folder, or of the folder ``onnx`` in it."""
    return sorted(folder.glob("*.onnx")) or sorted((folder / _SUBFOLDER).glob("*.onnx"))


def _graph(folder: Path, name: str) -> GraphFile:
    path = contained_path(folder, name)
    model = load_graph(path)
    inputs = [value.name for value in (*model.graph.input, *model.graph.initializer)]
    if marked := next((name for name in inputs if any(mark in name.casefold() for mark in _LORA_MARKS)), None):
        raise InputError(
            f"{path}: has LoRA of its own ({marked}): adapters are given to it, not merged into it",
            hint="merge into an export of the bare base",
            code="lora-graph",
        )
    return GraphFile(file=name, model=model, runs=runs_of(folder, name, model))


def _sharing(chosen: Path) -> list[str]:
    """Name a graph and those of its folder that read the same files of weights: they must change with it."""
    waiting = {path.name: _locations(path) for path in chosen.parent.glob("*.onnx") if path.name != chosen.name}
    found, places = [chosen.name], _locations(chosen)
    while joining := sorted(name for name, own in waiting.items() if own & places):
        found += joining
        places = places.union(*(waiting.pop(name) for name in joining))
    return found


def _locations(path: Path) -> set[str]:
    """Files that a graph keeps weights in; none where it is no graph, such as a file that was not fetched."""
    with suppress(InputError):
        tensors = load_graph(path).graph.initializer
        return {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}
    return set()


def _config(folder: Path) -> dict[str, Any]:
    """The model's configuration: beside the graphs, or beside the folder ``onnx`` that they are in."""
    places = [folder, *([folder.parent] if folder.name == _SUBFOLDER else [])]
    place = next((place for place in places if (place / _CONFIG_NAME).is_file()), None)
    return read_json(contained_path(place, _CONFIG_NAME)) if place is not None else {}


def _builders_config(folder: Path) -> dict[str, Any]:
    """What onnxruntime-genai's builder says about the model: its type."""
    if not (folder / _BUILDERS_CONFIG).is_file():
        return {}
    about = read_json(contained_path(folder, _BUILDERS_CONFIG)).get("model")
    return {"model_type": about["type"]} if isinstance(about, dict) and isinstance(about.get("type"), str) else {}


def _own_table(folder: Path, graphs: Iterable[GraphFile]) -> BindingTable | None:
    """The binding table of an export of ours, once graphs and table are seen to agree; None for another's.

    Raises:
        InputError: They do not, or the table is not the one that was exported.
    """
    if not (folder / TABLE_NAME).is_file():
        return None
    table, record = read_table(folder), read_record(folder)
    recorded = {file.path: file.sha256 for file in record.artifacts}
    if recorded.get(TABLE_NAME) != cached_sha256(folder / TABLE_NAME):
        raise InputError(f"{folder / TABLE_NAME}: is not the table that {RECORD_NAME} records")
    components = {component.file: component for component in table.components.values()}
    for graph in graphs:
        if graph.file not in components:
            raise InputError(f"{folder / graph.file}: is no graph of the export that it lies in")
        for fault in misplaced(folder, components[graph.file], table):
            raise InputError(f"{folder}: was changed since it was exported: {fault}")
    return table


def _tensors(
    folder: Path, explained: Sequence[Explained], findings: list[Finding]
) -> tuple[dict[str, TensorSpec], dict[str, tuple[Stored, ...]], tuple[Slot, ...]]:
    """Give tensors by name, views of all their copies, and the slots that they can be put back to."""
    contents = {file: map_file(contained_path(folder, file)) for file in {entry.slot.file for entry in explained}}
    views: dict[str, list[Stored]] = defaultdict(list)
    places: dict[str, Slot] = {}
    for entry in explained:
        stored = stored_array(contents[entry.slot.file], entry.slot)
        for name, view in views_of(entry.slot.origin, stored):
            for alias in entry.aliases or (name,):
                views[alias].append(view)
                places.setdefault(alias, entry.slot)
    for name, found in [*views.items()]:
        kinds = sorted({f"{view.dtype.itemsize * 8} bits {list(view.shape)}" for view in found})
        if len(kinds) > 1:
            message = f"stands for different matrices: {', '.join(kinds)}"
            findings.append(
                Finding(code="unexplained-initializer", severity=Severity.WARN, target=name, message=message)
            )
            del views[name]
    tensors = {
        name: TensorSpec(
            name=name,
            dtype=DType(places[name].dtype),
            shape=found[0].shape,
            file=places[name].file,
            start=0,  # not a place in the file: a turned matrix has none of its own
            stop=found[0].nbytes,
        )
        for name, found in views.items()
    }
    slots = (entry.slot for entry in explained)
    usable = tuple(slot for slot in slots if all(taken.tensor in views for taken in taken_tensors(slot.origin)))
    return tensors, {name: tuple(found) for name, found in views.items()}, usable
