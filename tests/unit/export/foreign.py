"""Exports as other tools write them, by hand: two square layers of a tiny model, each read in its own way."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from tests.builders import save_peft

SIZE = 8
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
LAYER = "model.layers.0"
Q, K, V = (f"{LAYER}.self_attn.{name}_proj" for name in "qkv")
UP = f"{LAYER}.mlp.up_proj"


def matrix(seed: int, n_rows: int = SIZE, n_cols: int = SIZE) -> Tensor:
    return torch.randn(n_rows, n_cols, generator=torch.Generator().manual_seed(seed))


def node(operator: str, inputs: Sequence[str], output: str, name: str = "", **attributes: Any) -> Any:
    """Make a node; a name is a path of modules, as older exporters write it."""
    return helper.make_node(operator, list(inputs), [output], name=name, **attributes)


def scoped(operator: str, inputs: Sequence[str], output: str, module: str, **attributes: Any) -> Any:
    """Make a node with the metadata of torch's exporter."""
    made = helper.make_node(operator, list(inputs), [output], name=f"node_{output}", **attributes)
    parts = module.split(".")
    path = ["", *(".".join(parts[: k + 1]) for k in range(len(parts))), output]
    entry = made.metadata_props.add()
    entry.key, entry.value = "pkg.torch.onnx.name_scopes", str(path)
    return made


def optimum(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[Any]]:
    """Two linear layers: anonymous transposed weights, modules in the names of nodes."""
    weights = {"onnx::MatMul_1": tensors[f"{Q}.weight"].T, "onnx::MatMul_2": tensors[f"{UP}.weight"].T}
    nodes = [
        node("MatMul", ["x", "onnx::MatMul_1"], "h", "/model/layers.0/self_attn/q_proj/MatMul"),
        node("MatMul", ["h", "onnx::MatMul_2"], "y", "/model/layers.0/mlp/up_proj/MatMul"),
    ]
    return weights, nodes


def plain_tensors() -> dict[str, Tensor]:
    return {f"{Q}.weight": matrix(1), f"{UP}.weight": matrix(2)}


def write(
    folder: Path,
    weights: Mapping[str, Tensor],
    nodes: Sequence[Any],
    *,
    file: str = "model.onnx",
    data: str | None = "model.onnx.data",
    config: Mapping[str, Any] | None = CONFIG,
    inputs: Sequence[str] = ("x",),
    output: str = "y",
) -> Path:
    """Write a graph; its weights go to ``data``, after 64 bytes of its own, or into the graph itself."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(dict(config)))
    initializers = [numpy_helper.from_array(value.contiguous().numpy(), name) for name, value in weights.items()]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in (*inputs, output)]
    graph = helper.make_graph(list(nodes), "by-hand", ports[:-1], ports[-1:], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    if data is not None:
        _make_external(model, folder, data)
    (folder / file).write_bytes(model.SerializeToString())
    return folder


def _make_external(model: Any, folder: Path, data: str) -> None:
    content = bytearray(b"head" * 16)
    for tensor in model.graph.initializer:
        raw = bytes(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", data), ("offset", len(content)), ("length", len(raw))):
            tensor.external_data.add(key=key, value=str(value))
        content += raw + b"between."
    (folder / data).write_bytes(content)


def adapter(folder: Path, *modules: str, shapes: Mapping[str, tuple[int, int]] | None = None, **config: Any) -> Path:
    """Write a PEFT adapter of rank 2 and scale 2; (out, in) is square unless ``shapes`` says otherwise."""
    tensors = {}
    for seed, module in enumerate(modules):
        n_out, n_in = (shapes or {}).get(module, (SIZE, SIZE))
        tensors[f"base_model.model.{module}.lora_A.weight"] = matrix(100 + seed, 2, n_in)
        tensors[f"base_model.model.{module}.lora_B.weight"] = matrix(200 + seed, n_out, 2)
    return save_peft(folder, tensors, {"target_modules": sorted({m.rpartition(".")[2] for m in modules}), **config})


def delta(folder: Path, module: str) -> Tensor:
    """What the adapter adds, (out, in), in float64."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "adapter_model.safetensors")
    down, up = (tensors[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "AB")
    return 2.0 * up @ down


def merged(base: Tensor, folder: Path, module: str) -> Tensor:
    """A merged weight, (out, in)."""
    return (base.double() + delta(folder, module)).float()


def initializers(folder: Path, file: str = "model.onnx") -> dict[str, Tensor]:
    model = onnx.load(str(folder / file), load_external_data=True)
    return {t.name: torch.from_numpy(np.array(numpy_helper.to_array(t))) for t in model.graph.initializer}
