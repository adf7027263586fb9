"""Time exported folders outside any merge: one by itself, or one beside another."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from lora_deploy.checkpoint import read_json
from lora_deploy.errors import EvidenceError, InputError
from lora_deploy.evidence.graphs import GraphFolder, find_graphs
from lora_deploy.evidence.latency import LatencyOptions, LatencyReport, check_latency, prove_by
from lora_deploy.export.canonical import canonical_digest, first_difference
from lora_deploy.merge.progress import Progress

_PROVE = prove_by(canonical_digest, first_difference)


def bench(
    folder: str | PathLike[str],
    *,
    against: str | PathLike[str] | None = None,
    options: LatencyOptions | None = None,
    progress: Progress | None = None,
) -> LatencyReport:
    """Time the graphs in a folder; without another one to compare with, beside themselves, which shows the noise.

    Raises:
        InputError: A folder holds no graphs, or no ``config.json`` that says their sizes.
        EvidenceError: The graphs cannot be timed.
        RecipeError: No provider has that name.
    """
    merged = _graphs(Path(folder))
    base = _graphs(Path(against)) if against is not None else merged
    report = check_latency(merged, base, _config(merged), options, prove=_PROVE, progress=progress)
    if not report.measurements:
        raise EvidenceError(f"{folder}: {report.reason}")
    return report


def _graphs(folder: Path) -> GraphFolder:
    found = find_graphs(folder)
    if found is None:
        raise InputError(f"{folder}: holds no exported graphs", hint="expected model.onnx beside export.json")
    return found


def _config(graphs: GraphFolder) -> dict[str, object]:
    places = (graphs.root / "config.json", graphs.root.parent / "config.json")
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise InputError(f"{graphs.root}: has no config.json, so the sizes of its inputs are unknown")
    return read_json(path)
