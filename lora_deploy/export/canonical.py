"""What a graph computes and costs, whatever its weights: one digest, and the first difference between two graphs.

Counted: opsets, inputs and outputs with their names, dtypes and shapes, every node's operator, attributes and wiring
in stored order, every initializer's dtype and shape, and the value of what is a constant rather than a weight.
Aside: names of inner values and nodes, documentation, metadata, producers, inferred inner shapes (they follow from the
rest), and where weights lie and what they are.

Promise (law 8): two graphs with one digest run the same kernels on tensors of the same shapes and dtypes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeAlias

from lora_deploy.errors import InputError
from lora_deploy.export.extras import require_onnx

MIN_WEIGHT_ELEMENTS = 64
"""Where a graph holds its weights itself, a floating or 4- or 8-bit tensor of fewer elements counts by value.

Where they lie in another file, everything that the graph holds does.
"""
_WEIGHT_TYPES = ("FLOAT", "DOUBLE", "BFLOAT16", "INT8", "UINT8", "INT4", "UINT4", "INT2", "UINT2", "COMPLEX")
"""Prefixes of the names of ONNX types that weights are stored in; other integers and booleans are constants."""

Proto: TypeAlias = Any
"""A message of the onnx package, which has no types."""
Line: TypeAlias = "tuple[str, str]"
"""A place for people, and what counts there."""
Port: TypeAlias = "tuple[str, str, tuple[int | str, ...]]"
"""Name, dtype and shape of an input or output."""


def canonical_digest(path: Path) -> str:
    """Digest a graph file: sha256 of all that counts, in order; external weights are not opened.

    Raises:
        InputError: The file is no ONNX graph.
        ExportError: The package onnx is missing.
    """
    digest = hashlib.sha256()
    for _, what in _lines(path):
        digest.update(what.encode())
        digest.update(b"\n")
    return digest.hexdigest()


def first_difference(left: Path, right: Path) -> str | None:
    """Name the first thing that counts and differs, as ``where: left vs right``; None when the digests are equal.

    Raises:
        InputError: One of the files is no ONNX graph.
        ExportError: The package onnx is missing.
    """
    nothing = ("end of the graph", "nothing")
    for ours, theirs in zip_longest(_lines(left), _lines(right), fillvalue=nothing):
        if ours[1] != theirs[1]:
            where = ours[0] if ours[0] == theirs[0] else f"{ours[0]} vs {theirs[0]}"
            return f"{where}: {ours[1]} vs {theirs[1]}"
    return None


def opset_of(path: Path) -> int:
    """Version of the standard operators that a graph uses.

    Raises:
        InputError: The file is no ONNX graph.
    """
    return int(next((opset.version for opset in load_graph(path).opset_import if not opset.domain), 0))


def ports_of(path: Path) -> tuple[list[Port], list[Port]]:
    """Inputs and outputs of a graph.

    Raises:
        InputError: The file is no ONNX graph.
    """
    graph = load_graph(path).graph
    fixed = {tensor.name for tensor in graph.initializer}
    inputs, outputs = (
        [(value.name, _dtype(value.type.tensor_type.elem_type), _sizes(value)) for value in values]
        for values in (graph.input, graph.output)
    )
    return [port for port in inputs if port[0] not in fixed], outputs


def load_graph(path: Path) -> Proto:
    """Parse a graph file; external weights are not opened.

    Raises:
        InputError: The file is no ONNX graph.
        ExportError: The package onnx is missing.
    """
    onnx = require_onnx()
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # the parser's own errors are of no common class
        raise InputError(f"{path}: is not an ONNX graph: {error}") from error
    if not model.opset_import:
        raise InputError(f"{path}: is not an ONNX graph: it imports no operators")
    return model


def raw_values(tensor: Proto) -> bytes:
    """The bytes of a tensor whose values are in the graph itself."""
    return bytes(require_onnx().numpy_helper.to_array(tensor).tobytes())


def _sizes(value: Proto) -> tuple[int | str, ...]:
    return tuple(
        dimension.dim_value if dimension.HasField("dim_value") else dimension.dim_param
        for dimension in value.type.tensor_type.shape.dim
    )


def _lines(path: Path) -> Iterator[Line]:
    model = load_graph(path)
    for opset in sorted(model.opset_import, key=lambda opset: opset.domain):
        yield f"opset {opset.domain or 'ai.onnx'}", f"opset {opset.domain or 'ai.onnx'} {opset.version}"
    external = _external()
    holds_weights = not any(tensor.data_location == external for tensor in model.graph.initializer)
    yield from _Scope(holds_weights=holds_weights).graph(model.graph, "graph")
    for function in sorted(model.functions, key=lambda function: (function.domain, function.name)):
        yield from _Scope(holds_weights=holds_weights).function(function)


@dataclass(slots=True)
class _Scope:
    """Values seen so far: numbered in the order of their definition, so that their names do not count."""

    holds_weights: bool
    """Whether weights lie in the graph itself, so that large tensors there may be weights."""
    numbers: dict[str, str] = field(default_factory=dict)
    dimensions: dict[str, str] = field(default_factory=dict)

    def graph(self, graph: Proto, where: str) -> Iterator[Line]:
        for value in graph.input:
            what = f"{value.name} {self._type(value.type)}" if where == "graph" else self._type(value.type)
            yield f"{where} input {value.name}", f"input {self._define(value.name)} {what}"
        for tensor in graph.initializer:
            place = f"{where} initializer {tensor.name}"
            yield place, f"initializer {self._define(tensor.name)} {self._tensor(tensor)}"
        if graph.sparse_initializer:
            yield (
                f"{where} sparse initializers",
                "".join(
                    hashlib.sha256(tensor.SerializeToString(deterministic=True)).hexdigest()
                    for tensor in graph.sparse_initializer
                ),
            )
        for position, node in enumerate(graph.node):
            yield from self._node(node, f"{where} node {position} {node.op_type} {node.name}".rstrip())
        for value in graph.output:
            name = f" {value.name} {self._type(value.type)}" if where == "graph" else ""
            yield f"{where} output {value.name}", f"output {self._use(value.name)}{name}"

    def function(self, function: Proto) -> Iterator[Line]:
        where = f"function {function.domain}::{function.name}"
        yield where, f"{where} {sorted(function.attribute)} {len(function.input)} {len(function.output)}"
        for name in function.input:
            self._define(name)
        for position, node in enumerate(function.node):
            yield from self._node(node, f"{where} node {position} {node.op_type}")
        yield f"{where} outputs", " ".join(self._use(name) for name in function.output)

    def _node(self, node: Proto, where: str) -> Iterator[Line]:
        inputs = " ".join(self._use(name) for name in node.input)
        operator = f"{node.domain or 'ai.onnx'}::{node.op_type}{node.overload and ':' + node.overload}"
        yield where, f"{operator} of ({inputs})"
        for attribute in sorted(node.attribute, key=lambda attribute: attribute.name):
            yield from self._attribute(attribute, f"{where} attribute {attribute.name}")
        yield f"{where} outputs", " ".join(self._define(name) if name else "-" for name in node.output)

    def _attribute(self, attribute: Proto, where: str) -> Iterator[Line]:
        onnx = require_onnx()
        kind = onnx.AttributeProto.AttributeType.Name(attribute.type)
        if attribute.ref_attr_name:
            yield where, f"{attribute.name} {kind} of {attribute.ref_attr_name}"
        elif kind in {"GRAPH", "GRAPHS"}:
            yield where, f"{attribute.name} {kind}"
            for graph in [attribute.g] if kind == "GRAPH" else attribute.graphs:
                # An inner graph sees the outer values; what it defines is its own.
                inner = _Scope(self.holds_weights, dict(self.numbers), self.dimensions)
                yield from inner.graph(graph, where)
        elif kind in {"TENSOR", "TENSORS"}:
            tensors = [attribute.t] if kind == "TENSOR" else attribute.tensors
            yield where, f"{attribute.name} {' '.join(self._tensor(tensor) for tensor in tensors)}"
        else:
            yield where, f"{attribute.name} {onnx.helper.get_attribute_value(attribute)!r}"

    def _tensor(self, tensor: Proto) -> str:
        kind = f"{_dtype(tensor.data_type)}{list(tensor.dims)}"
        if tensor.data_location == _external() or (self.holds_weights and not _is_constant(kind, tensor.dims)):
            return kind
        return f"{kind} = {hashlib.sha256(raw_values(tensor)).hexdigest()[:16]}"

    def _define(self, name: str) -> str:
        self.numbers[name] = f"%{len(self.numbers)}"
        return self.numbers[name]

    def _use(self, name: str) -> str:
        return self.numbers.get(name, f"?{name}") if name else "-"

    def _type(self, kind: Proto) -> str:
        which = kind.WhichOneof("value")
        if which != "tensor_type":
            return hashlib.sha256(kind.SerializeToString(deterministic=True)).hexdigest()
        if not kind.tensor_type.HasField("shape"):
            return f"{_dtype(kind.tensor_type.elem_type)}[?]"
        sizes = [self._dimension(dimension) for dimension in kind.tensor_type.shape.dim]
        return f"{_dtype(kind.tensor_type.elem_type)}[{', '.join(sizes)}]"

    def _dimension(self, dimension: Proto) -> str:
        if dimension.HasField("dim_value"):
            return str(dimension.dim_value)
        if not dimension.dim_param:
            return "?"
        return self.dimensions.setdefault(dimension.dim_param, f"d{len(self.dimensions)}")


def _external() -> int:
    """The mark of a tensor whose values lie in another file."""
    return int(require_onnx().TensorProto.EXTERNAL)


def _dtype(number: int) -> str:
    return str(require_onnx().TensorProto.DataType.Name(number))


def _is_constant(kind: str, sizes: Sequence[int]) -> bool:
    n_elements = 1
    for size in sizes:
        n_elements *= size
    return n_elements < MIN_WEIGHT_ELEMENTS or not kind.startswith(_WEIGHT_TYPES)
