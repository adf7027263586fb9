"""Graphs on a CUDA device: on the provider that was asked for, in full float32, timed by a clock that waits for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, save

from lora_deploy.evidence.graph_timing import watch_for
from lora_deploy.evidence.session import open_session
from lora_deploy.evidence.timing import BASE, MERGED, WALL, Times, measure

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        "CUDAExecutionProvider" not in onnxruntime.get_available_providers(),
        reason="needs onnxruntime-gpu: this onnxruntime has no CUDAExecutionProvider",
    ),
]
CUDA = "CUDAExecutionProvider"
WIDTH = 512


@pytest.fixture(scope="module")
def weights() -> np.ndarray:
    return np.random.default_rng(3).standard_normal((WIDTH, WIDTH), np.float32)


@pytest.fixture(scope="module")
def graph(weights: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a graph of one product, x @ w."""
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b", WIDTH]) for n in ("x", "y"))
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    tensor = helper.make_tensor("w", TensorProto.FLOAT, weights.shape, weights.tobytes(), raw=True)
    model = helper.make_model(
        helper.make_graph([node], "g", [x], [y], [tensor]), opset_imports=[helper.make_opsetid("", 20)]
    )
    model.ir_version = 10
    path = tmp_path_factory.mktemp("graph") / "g.onnx"
    save(model, path)
    return path


def test_the_provider_runs_every_node_and_says_that_tensor_float_is_off(graph: Path) -> None:
    session = open_session(graph, provider="cuda")
    assert session.provider == CUDA
    assert session.placement.n_nodes == {CUDA: 1}
    assert session.settings["use_tf32"] == "0"


def test_products_are_those_of_float32(graph: Path, weights: np.ndarray) -> None:
    x = torch.randn(64, WIDTH)
    found = open_session(graph, provider="cuda").run({"x": x})["y"].double()
    exact = x.double() @ torch.from_numpy(weights).double()
    # TensorFloat-32 keeps 10 bits, which leaves 1e-4 and more.
    assert float((found - exact).norm() / exact.norm()) < 2e-6


def test_bound_runs_are_waited_for_and_give_what_plain_ones_give(graph: Path) -> None:
    session = open_session(graph, provider="cuda")
    inputs = {"x": torch.randn(64, WIDTH)}
    bound = session.bind(session.feed(inputs))
    bound.run()
    assert np.array_equal(bound.outputs()[0], session.run(inputs)["y"].numpy())


def test_a_graph_takes_its_own_time_on_a_warm_device(graph: Path) -> None:
    class Side:
        phases = ("forward",)

        def __init__(self) -> None:
            session = open_session(graph, provider="cuda")
            self._bound = session.bind(session.feed({"x": torch.randn(4096, WIDTH)}))
            self._watch = watch_for("cuda")

        def run(self, phase: str) -> Times:
            stop = self._watch()
            self._bound.run()
            seconds = stop()
            return Times(seconds, seconds)

    found = measure({BASE: Side, MERGED: Side}, bound=0.2, seconds=30, seed=1, clock=WALL, warm_seconds=0.5)
    assert found.looks
    assert found.looks[-1].intervals["forward"].ratio == pytest.approx(1, abs=0.2)
