"""The export record, ``export.json``: what transformers' loader reads, and under one key of ours what was exported.

Promise: a schema version, digests of every input, graph and file; the same inputs, options and versions give the same
record. Nothing of the time is in it, and of the machine only where a direct export's base and adapters were read from.
Source: transformers 5.23 ``exporters/base.py``, ``ExportedModel.save_pretrained`` (schema 1).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lora_deploy.checkpoint import read_json
from lora_deploy.errors import Finding, InputError
from lora_deploy.merge.record import RecordedFile, RecordedFinding, RecordedOrigin
from lora_deploy.tensors import DType

RECORD_NAME = "export.json"
SCHEMA: Literal[1] = 1
_LOADERS_SCHEMA = 1


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def recorded_findings(findings: Iterable[Finding]) -> tuple[RecordedFinding, ...]:
    """Findings as a record has them."""
    return tuple(
        RecordedFinding(code=f.code, severity=f.severity.value, target=f.target, message=f.message) for f in findings
    )


class RecordedPort(_Frozen):
    """An input or output of a graph."""

    name: str
    dtype: str
    """ONNX type, such as ``FLOAT`` or ``INT64``."""
    shape: tuple[int | str, ...]
    """Sizes, and names of those that vary."""


class RecordedGraph(_Frozen):
    """One graph."""

    file: str
    canonical: str
    """Canonical digest: the base's."""
    inputs: tuple[RecordedPort, ...]
    outputs: tuple[RecordedPort, ...]


class RecordedInputs(_Frozen):
    """The inputs through which adapters change one matrix: A (in, r) and B (r, out), of rank 0 by default."""

    down: str
    """Name of A."""
    up: str
    """Name of B; the scale is part of its values."""
    n_in: int
    n_out: int
    is_turned: bool
    """Whether the checkpoint stores the matrix (out, in), as linear layers do."""
    dtype: DType
    """Format of both."""
    rank: int | None = None
    """The one that the graph is made for; None: any."""


class RecordedFactors(_Frozen):
    """What an adapter gives for one matrix."""

    rank: int
    scales: tuple[float, ...]
    """One for each update of the matrix, usually one; they are part of B's values."""


class RecordedAdapter(_Frozen):
    """An adapter that can be switched on."""

    file: str
    sha256: str
    """Of the adapter that was read."""
    config_sha256: str | None
    factors: dict[str, RecordedFactors]
    """By tensor name."""
    findings: tuple[RecordedFinding, ...]
    """What was noticed when it was bound to the base."""


class RecordedMultiLora(_Frozen):
    """What can be exchanged at run time."""

    digest: str
    """Of everything but the adapters."""
    inputs: dict[str, RecordedInputs]
    """By the checkpoint tensor that is changed."""
    adapters: dict[str, RecordedAdapter]
    """By name."""


class RecordedWeight(_Frozen):
    """What became of an initializer when the graphs were quantised."""

    graph: str
    """File of the first graph that reads it."""
    initializer: str
    """Its name before."""
    n_bytes_before: int
    n_bytes: int
    is_quantised: bool


class RecordedQuantisation(_Frozen):
    """What quantisation did to the weights; how is said by the options."""

    n_bytes_before: int
    """Of all weights, once each."""
    n_bytes: int
    weights: tuple[RecordedWeight, ...]
    """All that lie in files of weights."""


class ExportRecord(_Frozen):
    """Our part of the record."""

    schema_version: Literal[1] = Field(SCHEMA, alias="schema")
    digest: str
    """Of the inputs, graphs and options that decide every byte."""
    blueprint: str
    """Digest of what the graphs depend on; a base and all that is merged into it share it."""
    source: dict[str, Any]
    """``merged``: the weight files, by digest; or ``merge``: what was merged on the way, and how."""
    origin: RecordedOrigin | None = None
    """Of a direct export: what takes the place of a merge record, for planning the same merge again."""
    options: dict[str, Any]
    """``dtype``, ``provider``, ``storage``, ``layout`` and ``maker``, and ``quantisation`` if any, all resolved."""
    opset: int
    graphs: dict[str, RecordedGraph]
    """By component."""
    binding_table: str | None
    """File that says where every initializer comes from."""
    shared_share: float
    """[0..1] Part of the weights' bytes that the graphs read from the merged checkpoint's own files."""
    quantised: RecordedQuantisation | None = None
    """None where weights are in the graph's own format."""
    versions: dict[str, str]
    """Of what made the graphs, and quantised them."""
    findings: tuple[RecordedFinding, ...]
    artifacts: tuple[RecordedFile, ...]
    """Every file of the export but this one."""
    multi_lora: RecordedMultiLora | None = None
    """Of graphs with inputs for adapters."""


def compose(record: ExportRecord, components: dict[str, Any]) -> str:
    """Put both parts together; ``components`` is the loader's metadata by component, empty if it is not for it."""
    loaders = {
        name: {"file": graph.file, "metadata": components[name]}
        for name, graph in record.graphs.items()
        if name in components
    }
    whole = {
        "schema_version": _LOADERS_SCHEMA,
        "export_format": "onnx",
        "components": loaders,
        "lora_deploy": record.model_dump(mode="json", by_alias=True),
    }
    return json.dumps(whole, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def read_record(folder: Path) -> ExportRecord:
    """Read the export record of a folder.

    Raises:
        InputError: There is none, or it is not one of ours.
    """
    path = folder / RECORD_NAME
    if not path.is_file():
        raise InputError(f"{folder}: has no {RECORD_NAME}", hint="make one with lora-deploy export")
    found = read_json(path).get("lora_deploy")
    if found is None:
        raise InputError(f"{path}: was not written by lora-deploy", hint="make another with lora-deploy export")
    try:
        return ExportRecord.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{path}: {where}: {first['msg']}", hint="written by another version?") from error


def digest_of(identity: dict[str, Any]) -> str:
    """The sha256 of canonical JSON."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
