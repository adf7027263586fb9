"""Which provider runs which node; and inputs that lie on the device, on the CPU by the code that CUDA takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, save

from lora_deploy.errors import EvidenceError, ExportError
from lora_deploy.evidence.placement import Placement, count_nodes, placement_of
from lora_deploy.evidence.session import open_session
from lora_deploy.export import runtime

CPU = "CPUExecutionProvider"


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """Give a graph of relu(x @ w) and its shape."""
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b", width]) for n, width in (("x", 3), ("y", 4)))
    shape = helper.make_tensor_value_info("s", TensorProto.INT64, [2])
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="product"),
        helper.make_node("Relu", ["a"], ["y"], name="positive"),
        helper.make_node("Shape", ["y"], ["s"], name="size"),
    ]
    weights = helper.make_tensor("w", TensorProto.FLOAT, [3, 4], np.arange(12.0))
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y, shape], [weights]), opset_imports=[helper.make_opsetid("", 20)]
    )
    model.ir_version = 10
    save(model, tmp_path / "g.onnx")
    return tmp_path / "g.onnx"


def test_every_node_of_a_cpu_session_runs_there(graph: Path) -> None:
    session = open_session(graph)
    assert session.placement == Placement(provider=CPU, n_nodes={CPU: 3})
    assert session.placement.summary == f"all 3 nodes run on {CPU}"


def test_nodes_that_a_provider_leaves_to_another_are_counted_and_named(graph: Path) -> None:
    other = "AzureExecutionProvider"  # in every build; takes no node of this graph
    if other not in onnxruntime.get_available_providers():
        pytest.skip(f"needs {other}, which this onnxruntime does not have")
    options = runtime._options(onnxruntime, 1)
    session = onnxruntime.InferenceSession(str(graph), options, providers=[other, CPU])
    found = placement_of(session, other)
    assert found.n_nodes == {CPU: 3}
    assert found.fell_back == ("MatMul product", "Relu positive", "Shape size")
    assert found.summary == f"3 of 3 nodes fell back from {other}: 1 MatMul, 1 Relu, 1 Shape"
    assert found.to_json()["n_fell_back"] == 3


def test_a_runtime_that_does_not_tell_is_not_taken_for_one_without_fallbacks() -> None:
    found = count_nodes((), "CUDAExecutionProvider")
    assert not found.is_known
    assert "does not tell" in found.summary
    assert found.to_json()["n_fell_back"] is None


def test_bound_inputs_give_what_a_plain_run_gives(graph: Path) -> None:
    session = open_session(graph)
    inputs = {"x": torch.randn(5, 3)}
    bound = session.bind(session.feed(inputs))
    for _ in range(2):
        bound.run()
    expected = session.run(inputs)
    for name, value in zip(session.outputs, bound.outputs(), strict=True):
        assert np.array_equal(value, expected[name].numpy())


def test_a_bound_run_that_fails_is_an_error(graph: Path) -> None:
    session = open_session(graph)
    with pytest.raises(EvidenceError, match="does not run it"):
        session.bind({"x": np.ones((5, 2), np.float32)}).run()


def test_cuda_computes_float32_without_tensor_float_and_nothing_falls_back_while_running(
    graph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, object] = {}

    class Session:
        def get_providers(self) -> list[str]:
            return ["CUDAExecutionProvider", CPU]

        def disable_fallback(self) -> None:
            asked["fallback"] = False

    def make(_: str, *, sess_options: object, providers: list[object]) -> Session:
        asked["providers"] = providers
        return Session()

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", CPU])
    monkeypatch.setattr(onnxruntime, "InferenceSession", make)
    runtime.open_session(graph, "cuda")
    assert asked == {"providers": [("CUDAExecutionProvider", {"use_tf32": "0"})], "fallback": False}


def test_a_graph_that_does_not_load_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "g.onnx").write_bytes(b"no graph")
    with pytest.raises(ExportError, match="does not load it"):
        runtime.open_session(tmp_path / "g.onnx", "cpu")
