"""Inputs that stay float32 in a graph of 16 bits: numbers whose fraction counts, such as timesteps.

The exporter casts whatever floats a model is traced with to the model's own format, and 666.33 is 666.5 in float16, a
quarter of a radian of the quickest wave that it is embedded by.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any


def keep_float32(model: Any, names: Collection[str]) -> None:  # noqa: ANN401 - an onnx_ir.Model
    """Have a graph take these inputs in float32, in place; what reads one gets the format that it was traced in."""
    import onnx_ir

    for value in model.graph.inputs:
        if value.name.removeprefix("input.") not in names or value.dtype == onnx_ir.DataType.FLOAT:
            continue
        traced, uses = value.dtype, list(value.uses())
        value.type = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
        readers = [(node, index) for node, index in uses if node.op_type != "Cast"]
        if not readers:
            continue
        cast = onnx_ir.node("Cast", [value], {"to": traced.value}, name=f"{value.name}.cast")
        cast.outputs[0].name = f"{value.name}.cast"
        cast.outputs[0].type, cast.outputs[0].shape = onnx_ir.TensorType(traced), value.shape
        model.graph.insert_before(model.graph[0], cast)
        for node, index in readers:
            node.replace_input_with(index, cast.outputs[0])
