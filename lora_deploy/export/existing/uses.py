"""How a graph's nodes read its initializers: what they are multiplied with, and in which module.

The layout of a matrix is told by the node that reads it, never by its shape: the second factor of ``MatMul`` is stored
(in, out), of ``Gemm`` with ``transB`` (out, in), the table of ``Gather`` (rows, features). A ``Transpose`` on the way
turns it. The module is told by the node's metadata (torch's exporter) or its name (older exporters and
onnxruntime-genai's builder call nodes ``/model/layers.0/mlp/up_proj/MatMul``).
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeAlias

Proto: TypeAlias = Any
"""A message of the onnx package, which has no types."""

_SCOPES = "pkg.torch.onnx.name_scopes"
_PASSED_ON = frozenset({"Identity", "Cast"})
_PRODUCTS = frozenset({("", "MatMul"), ("", "Gemm"), ("com.microsoft", "FusedMatMul")})
"""Domain and operator of what multiplies with a matrix on the right."""


class Layout(StrEnum):
    """How the reading node shows a stored array to lie."""

    UPRIGHT = "upright"
    """A linear layer's (out, in), an embedding's (rows, features), a convolution's kernel."""
    TURNED = "turned"
    """A linear layer's (in, out), an embedding's (features, rows)."""
    VECTOR = "vector"
    """One axis, read by anything."""
    UNKNOWN = "unknown"
    """Read in a way that says nothing, or that only packed weights are read in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """One node that reads an initializer, perhaps through nodes that pass it on."""

    layout: Layout
    operator: str
    module: str | None
    """Dotted path of the module that the node belongs to; None where the graph does not say."""
    heads: tuple[int, int] | None = None
    """Of queries and of keys, where the product goes straight into an attention that takes all three packed."""


def uses_of(model: Proto) -> dict[str, list[Use]]:
    """Give the uses of every initializer, also of those in branches."""
    graph = model.graph
    nodes = list(_nodes(graph))
    source = {tensor.name: (tensor.name, False) for tensor in _initializers(graph)}
    dims = {tensor.name: len(tensor.dims) for tensor in _initializers(graph)}
    readers: dict[str, list[Proto]] = defaultdict(list)
    for node in nodes:
        for name in node.input:
            readers[name].append(node)
    uses: dict[str, list[Use]] = defaultdict(list)
    for node in nodes:
        for position, name in enumerate(node.input):
            if name not in source:
                continue
            initializer, is_turned = source[name]
            turns = _turns(node, dims[initializer])
            if turns is not None and len(readers[node.output[0]]):
                source[node.output[0]] = (initializer, is_turned != turns)
                continue
            layout = _layout(node, position, dims[initializer], is_turned=is_turned)
            heads = _heads(node, readers) if layout in {Layout.UPRIGHT, Layout.TURNED, Layout.VECTOR} else None
            operator = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            uses[initializer].append(Use(layout=layout, operator=operator, module=_module(node), heads=heads))
    for value in graph.output:
        if value.name in source:
            initializer, _ = source[value.name]
            uses[initializer].append(Use(layout=Layout.UNKNOWN, operator="output of the graph", module=None))
    return uses


def _nodes(graph: Proto) -> Iterator[Proto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from _nodes(inner)


def _initializers(graph: Proto) -> Iterator[Proto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from _initializers(inner)


def _attribute(node: Proto, name: str, default: int) -> int:
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == name), default)


def _turns(node: Proto, n_axes: int) -> bool | None:
    """Whether a node passes its input on turned; None if it does not pass it on."""
    if node.domain:
        return None
    if node.op_type in _PASSED_ON:
        return False
    if node.op_type != "Transpose" or n_axes != 2:
        return None
    order = next((list(attribute.ints) for attribute in node.attribute if attribute.name == "perm"), [1, 0])
    return order == [1, 0]


def _layout(node: Proto, position: int, n_axes: int, *, is_turned: bool) -> Layout:
    kind = (node.domain, node.op_type)
    if n_axes < 2:
        return Layout.VECTOR
    if n_axes == 2 and position == 1 and kind in _PRODUCTS and not _does_more(node):
        is_upright = bool(_attribute(node, "transB", 0)) and node.op_type != "MatMul"
    elif n_axes == 2 and position == 0 and kind == ("", "Gather") and _attribute(node, "axis", 0) == 0:
        is_upright = True
    elif position == 1 and node.op_type in {"Conv", "ConvTranspose"} and not node.domain:
        return Layout.UPRIGHT
    else:
        return Layout.UNKNOWN
    return Layout.UPRIGHT if is_upright != is_turned else Layout.TURNED


def _does_more(node: Proto) -> bool:
    """Whether a product is scaled, or its axes are other ones than the last two."""
    scales = (attribute.f for attribute in node.attribute if attribute.name == "alpha")
    return any(scale != 1 for scale in scales) or bool(_attribute(node, "transBatchB", 0))


def _heads(node: Proto, readers: dict[str, list[Proto]]) -> tuple[int, int] | None:
    """Heads of the attention that a product is packed for; a bias may be added on the way."""
    following = [reader for reader in readers[node.output[0]] if node.output]
    if len(following) != 1:
        return None
    if following[0].op_type == "Add" and node.op_type == "MatMul":
        return _heads(following[0], readers)
    attention = following[0]
    is_packed = attention.op_type == "GroupQueryAttention" and not any(attention.input[1:3])
    if not is_packed or attention.input[0] != node.output[0]:
        return None
    return _attribute(attention, "num_heads", 0), _attribute(attention, "kv_num_heads", 0)


def _module(node: Proto) -> str | None:
    scopes = next((entry.value for entry in node.metadata_props if entry.key == _SCOPES), None)
    if scopes is not None:
        try:
            path = ast.literal_eval(scopes)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return None
        is_path = isinstance(path, list) and len(path) > 1 and isinstance(path[-2], str)
        return path[-2] or None if is_path else None
    if not node.name.startswith("/"):
        return None
    return ".".join(node.name.split("/")[1:-1]) or None
