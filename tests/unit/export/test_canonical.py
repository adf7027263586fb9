"""The canonical digest sees what changes cost or meaning, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from lora_deploy.errors import InputError
from lora_deploy.export.canonical import canonical_digest, first_difference

Change = Callable[[Any], None]


def _model(weights: Any = 0.0) -> Any:
    big = numpy_helper.from_array(np.full((16, 8), weights, np.float32), "w")
    shape = numpy_helper.from_array(np.array([-1, 4], np.int64), "shape")
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"], name="first"),
        helper.make_node("Reshape", ["y", "shape"], ["z"], allowzero=0),
        helper.make_node("Softmax", ["z"], ["out"], axis=-1),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 16])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["rows", 4])
    graph = helper.make_graph(nodes, "g", [x], [out], [big, shape])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


def _saved(folder: Path, name: str, model: Any, **options: Any) -> Path:
    onnx.save(model, str(folder / name), **options)
    return folder / name


def _rename_inner(model: Any) -> None:
    model.graph.node[0].output[0] = model.graph.node[1].input[0] = "renamed"
    model.graph.node[0].name = "another"
    model.graph.initializer[0].name = model.graph.node[0].input[1] = "weights"


def _describe(model: Any) -> None:
    model.producer_name, model.doc_string = "someone", "text"
    model.graph.node[0].doc_string = "text"
    model.graph.node[0].metadata_props.add(key="stack", value="/home/me")


def _rename_symbol(model: Any) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "s72"


@pytest.mark.parametrize("change", [_rename_inner, _describe, _rename_symbol])
def test_names_and_metadata_do_not_count(tmp_path: Path, change: Change) -> None:
    changed = _model()
    change(changed)
    left, right = _saved(tmp_path, "a.onnx", _model()), _saved(tmp_path, "b.onnx", changed)
    assert left.read_bytes() != right.read_bytes()
    assert first_difference(left, right) is None
    assert canonical_digest(left) == canonical_digest(right)


def test_weights_do_not_count_wherever_they_lie(tmp_path: Path) -> None:
    left = _saved(tmp_path, "a.onnx", _model())
    right = _saved(
        tmp_path, "b.onnx", _model(7.0), save_as_external_data=True, location="elsewhere.bin", size_threshold=100
    )
    assert canonical_digest(left) == canonical_digest(right)


def test_a_large_constant_counts_where_the_weights_lie_elsewhere(tmp_path: Path) -> None:
    def graph(name: str, value: float) -> Path:
        model = _model()
        table = numpy_helper.from_array(np.full((64, 8), value, np.float32), "cos_cache")
        model.graph.initializer.append(table)
        path = _saved(tmp_path, name, model, save_as_external_data=True, location=f"{name}.data", size_threshold=0)
        stored = onnx.load(str(path), load_external_data=False)
        stored.graph.initializer[-1].CopyFrom(table)
        onnx.save(stored, str(path))
        return path

    difference = first_difference(graph("a.onnx", 1.0), graph("b.onnx", 2.0))
    assert difference is not None
    assert difference.startswith("graph initializer cos_cache: ")


def _add_node(model: Any) -> None:
    model.graph.node.insert(1, helper.make_node("Identity", ["y"], ["copy"]))
    model.graph.node[2].input[0] = "copy"


def _add_unused_node(model: Any) -> None:
    model.graph.node.append(helper.make_node("Identity", ["out"], ["unused"]))


def _rewire(model: Any) -> None:
    model.graph.node[2].input[0] = "y"


def _change_attribute(model: Any) -> None:
    model.graph.node[2].attribute[0].i = 0


def _change_constant(model: Any) -> None:
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.array([-1, 8], np.int64), "shape"))


def _change_dtype(model: Any) -> None:
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.zeros((16, 8), np.float16), "w"))


def _change_shape(model: Any) -> None:
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.zeros((8, 16), np.float32), "w"))


def _fix_symbol(model: Any) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1


def _rename_input(model: Any) -> None:
    model.graph.input[0].name = model.graph.node[0].input[0] = "input_ids"


def _newer_opset(model: Any) -> None:
    model.opset_import[0].version = 21


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_add_node, "graph node 1"),
        (_add_unused_node, "graph output out vs graph node 3 Identity: "),
        (_rewire, "graph node 2 Softmax"),
        (_change_attribute, "graph node 2 Softmax attribute axis: axis -1 vs axis 0"),
        (_change_constant, "graph initializer shape: "),
        (_change_dtype, "graph initializer w: initializer %1 FLOAT[16, 8] vs initializer %1 FLOAT16[16, 8]"),
        (_change_shape, "graph initializer w: "),
        (_fix_symbol, "graph input x: "),
        (_rename_input, "graph input x vs graph input input_ids: "),
        (_newer_opset, "opset ai.onnx: opset ai.onnx 20 vs opset ai.onnx 21"),
    ],
)
def test_a_planted_difference_is_seen_and_named(tmp_path: Path, change: Change, named: str) -> None:
    changed = _model()
    change(changed)
    left, right = _saved(tmp_path, "a.onnx", _model()), _saved(tmp_path, "b.onnx", changed)
    assert canonical_digest(left) != canonical_digest(right)
    difference = first_difference(left, right)
    assert difference is not None
    assert difference.startswith(named)


def _choice(then: float) -> Any:
    def branch(value: float) -> Any:
        constant = helper.make_node("Constant", [], ["c"], value_float=value)
        added = helper.make_node("Add", ["x", "c"], ["r"])
        return helper.make_graph(
            [constant, added], "branch", [], [helper.make_tensor_value_info("r", TensorProto.FLOAT, ["n"])]
        )

    node = helper.make_node("If", ["p"], ["y"], then_branch=branch(then), else_branch=branch(2.0))
    inputs = [
        helper.make_tensor_value_info("p", TensorProto.BOOL, []),
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"]),
    ]
    graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


def test_a_difference_inside_a_branch_is_seen(tmp_path: Path) -> None:
    left, right = _saved(tmp_path, "a.onnx", _choice(1.0)), _saved(tmp_path, "b.onnx", _choice(1.5))
    difference = first_difference(left, right)
    assert difference is not None
    assert "attribute then_branch node 0 Constant" in difference
    assert "1.0 vs value_float 1.5" in difference


@pytest.mark.parametrize("content", [b"", b"not a graph at all"])
def test_what_is_no_graph_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(InputError, match="is not an ONNX graph"):
        canonical_digest(path)
