"""Read which inputs for adapters a graph has: of ours by the record, of other tools by the inputs' names.

What counts is an input A (in, r) and an input B (r, out) of a module, each with a default value, named ``….lora_A…``
and ``….lora_B…``. onnxruntime exchanges nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from lora_deploy.checkpoint import read_json
from lora_deploy.errors import InputError
from lora_deploy.export.canonical import load_graph
from lora_deploy.export.extras import require_onnx
from lora_deploy.export.record import RecordedInputs, read_record
from lora_deploy.tensors import DType

_INPUT = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+?)\.lora_(?P<side>[AB])(?:\.|$)")
_RUNTIME_NAMES = {"FLOAT": "tensor(float)", "DOUBLE": "tensor(double)"}
_DTYPES = {
    "tensor(float)": DType.F32,
    "tensor(float16)": DType.F16,
    "tensor(bfloat16)": DType.BF16,
    "tensor(double)": DType.F64,
}

Inputs: TypeAlias = "Mapping[str, tuple[str, tuple[int | str, ...]]]"
"""Format as onnxruntime says it, and shape, by name; sizes that vary are names."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SwitchableGraph:
    """Graphs that adapters can be switched on in."""

    path: Path
    """As the user named it."""
    config: Mapping[str, Any]
    ports: Mapping[str, RecordedInputs]
    """By tensor name."""
    inputs: Inputs
    """Those with a default that every graph has."""

    @property
    def folder(self) -> Path:
        """Where the graphs lie."""
        return _folder(self.path)


def open_switchable(path: Path) -> SwitchableGraph:
    """Read the LoRA inputs of a graph file, or of all graphs in a folder.

    Raises:
        InputError: There is no graph, or none of its inputs is one for adapters.
        ExportError: The package onnx is missing.
    """
    folder = _folder(path)
    files = sorted(path.glob("*.onnx")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{path}: holds no ONNX graph", hint="expected a folder of lora-deploy export, or a file")
    inputs = _shared([_overridable(file) for file in files])
    ports: Mapping[str, RecordedInputs] = dict(_ports(inputs))
    if not ports:
        raise InputError(
            f"{path}: takes no adapters: none of its inputs with a default value is named ….lora_A… or ….lora_B…",
            hint="make such graphs with lora-deploy export --onnx --multi-lora",
            code="no-lora-inputs",
        )
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    with suppress(InputError):  # no record, or another tool's: the names say enough
        recorded = read_record(folder).multi_lora
        known = recorded.inputs if recorded is not None else ports
        ports = {name: port for name, port in known.items() if {port.down, port.up} <= inputs.keys()}
    return SwitchableGraph(path=path, config=config, ports=ports, inputs=inputs)


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _overridable(file: Path) -> Inputs:
    """Inputs of a graph that have a default: format and shape by name."""
    onnx = require_onnx()
    graph = load_graph(file).graph
    defaults = {tensor.name for tensor in graph.initializer}
    found: dict[str, tuple[str, tuple[int | str, ...]]] = {}
    for value in graph.input:
        if value.name in defaults:
            kind = value.type.tensor_type
            sizes = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param for d in kind.shape.dim)
            name = onnx.TensorProto.DataType.Name(kind.elem_type)
            found[value.name] = (_RUNTIME_NAMES.get(name, f"tensor({name.lower()})"), sizes)
    return found


def _shared(graphs: Sequence[Inputs]) -> Inputs:
    """Inputs that every graph has: a file is given to all of them, and one that lacks a name refuses it."""
    return {name: found for name, found in graphs[0].items() if all(name in other for other in graphs)}


def _ports(inputs: Inputs) -> Iterator[tuple[str, RecordedInputs]]:
    modules: dict[str, dict[str, str]] = {}
    for name in inputs:
        match = _INPUT.match(name)
        if match is not None:
            modules.setdefault(match["module"], {})[match["side"]] = name
    for module, sides in modules.items():
        if sides.keys() != {"A", "B"}:
            continue
        (kind, down), (_, up) = inputs[sides["A"]], inputs[sides["B"]]
        if len(down) != 2 or len(up) != 2 or not (isinstance(down[0], int) and isinstance(up[1], int)):
            continue
        rank = next((size for size in (down[1], up[0]) if isinstance(size, int)), None)
        dtype = _DTYPES.get(kind)
        if dtype is not None:
            pair = {"down": sides["A"], "up": sides["B"]}
            found = RecordedInputs(**pair, n_in=down[0], n_out=up[1], rank=rank, dtype=dtype, is_turned=True)
            yield f"{module}.weight", found
