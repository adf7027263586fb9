"""Edit a finished graph: beside products with a weight, compute low-rank updates of it: ``y = x·W + (x·A)·B``.

Promise: nothing else changes. With A and B of rank 0 the sum adds zeros, so the graph is the base's. The names of
outputs stay; A is (in, r) and B (r, out), both in the weight's format, and the scale is part of B.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lora_deploy.export.drawn import onnx_type
from lora_deploy.export.extras import require_onnx_ir
from lora_deploy.export.products import Factor, Product
from lora_deploy.tensors import DType

Model = Any
"""An ``onnx_ir.Model``."""
Value = Any
"""An ``onnx_ir.Value``."""
Pair = tuple[Value, Value]
"""A (in, r) and B (r, out)."""


def input_names(tensor: str) -> tuple[str, str]:
    """Names of A and B of a checkpoint tensor."""
    module = tensor.removesuffix(".weight")
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def add_inputs(model: Model, factor: Factor) -> Pair:
    """Add A and B as inputs of any rank that may be left out: by default the rank is 0."""
    down, up = input_names(factor.tensor)
    rank = f"{factor.tensor.removesuffix('.weight')}.rank"
    pair = (
        _initializer(model, down, _empty(down, (factor.n_in, 0), factor.dtype), (factor.n_in, rank)),
        _initializer(model, up, _empty(up, (0, factor.n_out), factor.dtype), (rank, factor.n_out)),
    )
    model.graph.inputs.extend(pair)
    return pair


def add_constants(model: Model, down: Any, up: Any) -> Pair:  # noqa: ANN401 - two onnx_ir tensors
    """Add A and B as weights of the graph, under their own names."""
    return _initializer(model, down.name, down, down.shape), _initializer(model, up.name, up, up.shape)


def add_branches(model: Model, products: Sequence[Product], pairs: Mapping[str, Pair]) -> None:
    """Compute the updates of some tensors beside every product with them.

    Where a weight is several tensors side by side, what has no update adds zeros: a product of rank 0.
    """
    for number, product in enumerate(products):
        if any(factor.tensor in pairs for factor in product.factors):
            branches = [pairs.get(factor.tensor) or _nothing(model, factor) for factor in product.factors]
            _add(product, branches, f"lora.{number}")


def _add(product: Product, branches: Sequence[Pair], name: str) -> None:
    ir = require_onnx_ir()
    node = product.node
    x, y = node.inputs[0], node.outputs[0]
    nodes, deltas = [], []
    for k, (down, up) in enumerate(branches):
        inner = ir.node("MatMul", [x, down], name=f"{name}.{k}.A")
        outer = ir.node("MatMul", [inner.outputs[0], up], name=f"{name}.{k}.B")
        nodes += [inner, outer]
        deltas.append(outer.outputs[0])
    if len(deltas) > 1:
        joined = ir.node("Concat", deltas, {"axis": -1}, name=f"{name}.joined")
        nodes.append(joined)
        deltas = [joined.outputs[0]]
    total = ir.node("Add", [deltas[0], deltas[0]], name=f"{name}.sum")
    for new in (*nodes, total):
        new.outputs[0].name = new.name
        new.outputs[0].type = y.type
    z = total.outputs[0]
    z.shape = y.shape
    is_output = y.is_graph_output()
    y.replace_all_uses_with(z, replace_graph_outputs=True)
    total.replace_input_with(0, y)
    if is_output:
        y.name, z.name = f"{y.name}.base", y.name
    node.graph.insert_after(node, [*nodes, total])


def _nothing(model: Model, factor: Factor) -> Pair:
    """A and B of rank 0, as constants: one for all of the same size."""
    kind = factor.dtype.long_name
    shapes = {f"lora.{kind}.{factor.n_in}x0": (factor.n_in, 0), f"lora.{kind}.0x{factor.n_out}": (0, factor.n_out)}
    known = model.graph.initializers
    down, up = (
        known[name] if name in known else _initializer(model, name, _empty(name, shape, factor.dtype), shape)
        for name, shape in shapes.items()
    )
    return down, up


def _empty(name: str, shape: tuple[int, int], dtype: DType) -> Any:  # noqa: ANN401
    ir = require_onnx_ir()
    kind = onnx_type(dtype)
    return ir.Tensor(np.empty(shape, kind.numpy()), dtype=kind, shape=ir.Shape(shape), name=name)


def _initializer(model: Model, name: str, tensor: Any, shape: Any) -> Value:  # noqa: ANN401
    ir = require_onnx_ir()
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(shape), const_value=tensor)
    model.graph.initializers[name] = value
    return value
