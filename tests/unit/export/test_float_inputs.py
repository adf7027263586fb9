"""Inputs whose fraction counts stay float32 in graphs of 16 bits."""

from __future__ import annotations

import numpy as np
import onnx_ir
import onnxruntime
from onnx import TensorProto, helper

from lora_deploy.export.float_inputs import keep_float32


def graph() -> onnx_ir.Model:
    """``waves`` as a UNet makes them, of the number in float32, and ``scaled`` as a transformer does, in float16."""
    half, single = TensorProto.FLOAT16, TensorProto.FLOAT
    nodes = [
        helper.make_node("Cast", ["timestep"], ["wide"], to=single),
        helper.make_node("Sin", ["wide"], ["waves"]),
        helper.make_node("Add", ["timestep", "other"], ["scaled"]),
    ]
    inputs = [helper.make_tensor_value_info(name, half, []) for name in ("timestep", "other")]
    outputs = [
        helper.make_tensor_value_info("waves", single, []),
        helper.make_tensor_value_info("scaled", half, []),
    ]
    opsets = [helper.make_opsetid("", 20)]
    return onnx_ir.from_proto(
        helper.make_model(helper.make_graph(nodes, "g", inputs, outputs), opset_imports=opsets, ir_version=10)
    )


def run(model: onnx_ir.Model, timestep: float) -> dict[str, float]:
    session = onnxruntime.InferenceSession(
        onnx_ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    given = {"timestep": timestep, "other": 0.0}
    feed = {port.name: np.array(given[port.name], types[port.type]) for port in session.get_inputs()}
    return dict(zip([port.name for port in session.get_outputs()], map(float, session.run(None, feed)), strict=True))


def test_a_timestep_reaches_float32_whole_and_float16_rounded_once() -> None:
    timestep = 666.33
    assert abs(run(graph(), timestep)["waves"] - np.sin(np.float32(timestep))) > 0.05
    model = graph()
    keep_float32(model, {"timestep"})
    found = run(model, timestep)
    assert abs(found["waves"] - np.sin(np.float32(timestep))) < 1e-6
    assert found["scaled"] == float(np.float16(timestep))
    types = {value.name: value.dtype for value in model.graph.inputs}
    assert types == {"timestep": onnx_ir.DataType.FLOAT, "other": onnx_ir.DataType.FLOAT16}


def test_other_graphs_stay_as_they_are() -> None:
    model = graph()
    before = onnx_ir.to_proto(model).SerializeToString()
    keep_float32(model, {"sigma"})
    assert onnx_ir.to_proto(model).SerializeToString() == before
