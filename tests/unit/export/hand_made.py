"""A graph maker by hand: what the graph is, the test decides. No model, no tracing: it takes milliseconds.

The model is two linear layers with a norm between: ``y = (x · Aᵀ · n) · Bᵀ``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file
from torch import Tensor

from lora_deploy.checkpoint import Checkpoint
from lora_deploy.errors import Finding
from lora_deploy.export.interface import Drawing, GraphTask
from lora_deploy.export.options import ExportOptions
from lora_deploy.export.plan import ExportPlan, plan_export
from lora_deploy.export.sources import CheckpointSource
from tests.builders import make_checkpoint

CONFIG = {"model_type": "hand-made", "architectures": ["HandMade"]}
Draw = Callable[[Mapping[str, Tensor]], Any]

_TYPES = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16}


def model_of(initializers: Mapping[str, Tensor], nodes: list[Any], dtype: torch.dtype) -> Any:
    """Make a model with inputs x (batch, 8) and output y (batch, 8)."""
    ports = [helper.make_tensor_value_info(name, _TYPES[dtype], ["batch", 8]) for name in ("x", "y")]
    tensors = [numpy_helper.from_array(value.contiguous().numpy(), name) for name, value in initializers.items()]
    graph = helper.make_graph(nodes, "hand-made", ports[:1], ports[1:], tensors)
    domains = {"": 20, **{node.domain: 1 for node in nodes if node.domain}}
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid(*pair) for pair in domains.items()], ir_version=10
    )


def plain(tensors: Mapping[str, Tensor], **others: Tensor) -> Any:
    """Draw the model as an optimiser would: matrices transposed, the norm as it is, one constant."""
    a, b, norm = tensors["a.weight"], tensors["b.weight"], tensors["norm.weight"]
    initializers = {"val_1": a.T, "norm.weight": norm, "val_2": b.T, "one": torch.ones((), dtype=a.dtype)} | others
    nodes = [
        helper.make_node("MatMul", ["x", "val_1"], ["h"]),
        helper.make_node("Mul", ["h", "norm.weight"], ["n"]),
        helper.make_node("Mul", ["n", "one"], ["m"]),
        helper.make_node("MatMul", ["m", "val_2"], ["y"]),
    ]
    return model_of(initializers, nodes, a.dtype)


def stored(tensors: Mapping[str, Tensor]) -> Any:
    """Draw it with one weight in the checkpoint's own layout."""
    a, b, norm = tensors["a.weight"], tensors["b.weight"], tensors["norm.weight"]
    nodes = [
        helper.make_node("Gemm", ["x", "a.weight"], ["h"], transB=1),
        helper.make_node("Mul", ["h", "norm.weight"], ["n"]),
        helper.make_node("MatMul", ["n", "val_2"], ["y"]),
    ]
    return model_of({"a.weight": a, "norm.weight": norm, "val_2": b.T}, nodes, a.dtype)


@dataclass(frozen=True)
class HandMaker:
    """Draws what it is told to."""

    draw_one: Draw = plain
    name: str = "transformers"
    packages: tuple[str, ...] = ()
    components: tuple[str, ...] = ("model",)
    findings: tuple[Finding, ...] = ()

    def draw(self, task: GraphTask) -> Iterator[Drawing]:
        for component in self.components:
            for seed, folder in enumerate(task.checkpoints):
                dtype = getattr(torch, task.dtype.long_name)
                tensors = {name: t.to(dtype) for name, t in load_file(folder / "model.safetensors").items()}
                model = onnx_ir.serde.deserialize_model(self.draw_one(tensors))
                about = {"architecture": "HandMade"}
                yield Drawing(component=component, seed=seed, model=model, metadata=about, findings=self.findings)

    def companions(self, _: GraphTask) -> Mapping[str, bytes]:
        return {}

    def settled(
        self, companions: Mapping[str, bytes], _config: Mapping[str, Any], _generation: Mapping[str, Any]
    ) -> Mapping[str, bytes]:
        return companions


def weights(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (6, 8), "norm.weight": (6,), "b.weight": (8, 6)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def checkpoint(folder: Path, tensors: Mapping[str, Tensor] | None = None, **config: Any) -> Checkpoint:
    return make_checkpoint(folder, tensors if tensors is not None else weights(), {**CONFIG, **config})


def planned(
    found: Checkpoint, maker: Any = None, companions: Mapping[str, Path] | None = None, **options: Any
) -> ExportPlan:
    plan = plan_export(CheckpointSource(found, companions or {}), ExportOptions(**options))
    return replace(plan, maker=maker or HandMaker())


def expected(tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return ((x @ tensors["a.weight"].float().T) * tensors["norm.weight"].float()) @ tensors["b.weight"].float().T


def loaded(path: Path) -> Any:
    return onnx.load(str(path), load_external_data=True)
