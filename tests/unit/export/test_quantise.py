"""Quantised exports of graphs by hand: what onnxruntime's tools make of the whole graph, weight by weight."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from torch import Tensor

from lora_deploy.errors import ExportError
from lora_deploy.export.execute import Exported, default_output, execute_export
from lora_deploy.export.quantisation import Quantisation
from lora_deploy.export.quantiser import rewriting
from lora_deploy.export.replay import replay_export
from lora_deploy.export.sources import CheckpointSource
from tests.merging import digests
from tests.unit.export.hand_made import HandMaker, checkpoint, loaded, model_of, planned, stored

METHODS = ("int4", "int8-blockwise", "int8")
SHAPES = {"a.weight": (48, 8), "c.weight": (48, 8), "norm.weight": (48,), "b.weight": (8, 48)}


def weights(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def gated(tensors: Mapping[str, Tensor]) -> Any:
    """Draw y = ((x · Aᵀ + x · Cᵀ) · n) · Bᵀ: two products of one activation, nodes with names."""
    a, b, c, norm = (tensors[name] for name in ("a.weight", "b.weight", "c.weight", "norm.weight"))
    nodes = [
        helper.make_node("MatMul", ["x", "A"], ["h"], name="first"),
        helper.make_node("MatMul", ["x", "C"], ["g"], name="gate"),
        helper.make_node("Add", ["h", "g"], ["s"], name="sum"),
        helper.make_node("Mul", ["s", "norm.weight"], ["n"], name="norm"),
        helper.make_node("MatMul", ["n", "B"], ["y"], name="last"),
    ]
    return model_of({"A": a.T, "C": c.T, "B": b.T, "norm.weight": norm}, nodes, a.dtype)


def square_thrice(tensors: Mapping[str, Tensor]) -> Any:
    """Draw y = x · S · S · Sᵀ: two products read one matrix, and a Transpose does, as of a tied head."""
    nodes = [
        helper.make_node("MatMul", ["x", "S"], ["h"], name="first"),
        helper.make_node("MatMul", ["h", "S"], ["m"], name="again"),
        helper.make_node("Transpose", ["S"], ["t"], perm=[1, 0], name="turned"),
        helper.make_node("MatMul", ["m", "t"], ["y"], name="head"),
    ]
    return model_of({"S": tensors["s.weight"]}, nodes, torch.float32)


def quantised(folder: Path, method: str, tensors: Mapping[str, Tensor] | None = None, **options: Any) -> Exported:
    found = checkpoint(folder / "m", tensors if tensors is not None else weights())
    plan = planned(found, HandMaker(gated), quantize=method, **options)
    return execute_export(plan, folder / "out")


def whole_by_the_tool(model: Any, method: str, folder: Path, *, is_symmetric: bool) -> Any:
    """What onnxruntime's tool makes of a whole graph at once."""
    if method == "int8":
        path = folder / "tool.onnx"
        quantize_dynamic(model, path, op_types_to_quantize=["MatMul"], per_channel=True, weight_type=QuantType.QUInt8)
        return onnx.load(folder / "tool.onnx")
    bits = 4 if method == "int4" else 8
    tool = MatMulNBitsQuantizer(model, bits=bits, block_size=32, is_symmetric=is_symmetric, accuracy_level=4)
    tool.process()
    return tool.model.model


def described(model: Any) -> tuple[list[Any], dict[str, Any]]:
    """Nodes, and initializers by name."""
    nodes = [
        (
            n.domain,
            n.op_type,
            n.name,
            *n.input,
            *n.output,
            [(a.name, helper.get_attribute_value(a)) for a in n.attribute],
        )
        for n in model.graph.node
    ]
    values = {t.name: (t.data_type, *t.dims, numpy_helper.to_array(t).tobytes()) for t in model.graph.initializer}
    return sorted(nodes, key=repr), values


@pytest.mark.parametrize(
    ("method", "is_symmetric"),
    [("int4", False), ("int4", True), ("int8-blockwise", False), ("int8-blockwise", True), ("int8", None)],
)
def test_every_node_and_byte_is_what_the_tool_makes_of_the_whole_graph(
    method: str, is_symmetric: bool | None, tmp_path: Path
) -> None:
    plain = execute_export(planned(checkpoint(tmp_path / "m", weights()), HandMaker(gated)), tmp_path / "plain")
    expected = whole_by_the_tool(loaded(plain.graphs["model"]), method, tmp_path, is_symmetric=bool(is_symmetric))
    found = quantised(tmp_path / "q", method, is_symmetric=is_symmetric)
    assert described(loaded(found.graphs["model"])) == described(expected)


def _unpacked(packed: np.ndarray, bits: int, n: int) -> np.ndarray:
    """Elements of the last axis, low bits first."""
    if bits == 8:
        return packed[..., :n].astype(np.float64)
    both = np.stack([packed & 15, packed >> 4], axis=-1)
    return both.reshape(*packed.shape[:-1], -1)[..., :n].astype(np.float64)


@pytest.mark.parametrize(("method", "bits"), [("int4", 4), ("int8-blockwise", 8)])
@pytest.mark.parametrize("block_size", [16, 32, 256])
def test_blocks_hold_every_weight_to_half_a_step(method: str, bits: int, block_size: int, tmp_path: Path) -> None:
    tensors = weights()
    found = quantised(tmp_path, method, tensors, block_size=block_size)
    values = {t.name: numpy_helper.to_array(t) for t in loaded(found.graphs["model"]).graph.initializer}
    expected = tensors["b.weight"].double().numpy()  # (out, in), as blocks lie
    packed, scales = values[f"B_Q{bits}"], values["B_scales"].astype(np.float64)
    n_blocks = packed.shape[1]
    zeros = _unpacked(values["B_zero_points"].reshape(len(scales), -1), bits, n_blocks)
    steps = _unpacked(packed, bits, block_size) - zeros[..., None]
    found_values = (steps * scales[..., None]).reshape(len(scales), -1)[:, : expected.shape[1]]
    allowed = 1.01 * np.repeat(np.abs(scales), block_size, axis=1)[:, : expected.shape[1]]
    assert (np.abs(found_values - expected) <= allowed).all()  # half a step, and another where zero was rounded
    assert np.abs(found_values - expected).mean() < 0.3 * np.abs(scales).mean()


@pytest.mark.parametrize(
    ("method", "dtype"),
    [*((method, torch.float32) for method in METHODS), ("int4", torch.float16), ("int8-blockwise", torch.float16)],
)
def test_the_graph_computes_nearly_what_it_did(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = weights(dtype=dtype)
    found = quantised(tmp_path, method, tensors)
    session = onnxruntime.InferenceSession(str(found.graphs["model"]), providers=["CPUExecutionProvider"])
    x = torch.randn(3, 8).to(dtype)
    y = torch.from_numpy(session.run(None, {"x": x.numpy()})[0]).double()
    a, b, c, norm = (tensors[name].double() for name in ("a.weight", "b.weight", "c.weight", "norm.weight"))
    expected = ((x.double() @ a.T + x.double() @ c.T) * norm) @ b.T
    error = float((y - expected).norm() / expected.norm())
    assert 0 < error < (0.25 if method == "int4" else 0.03)


@pytest.mark.parametrize("method", METHODS)
def test_base_and_merged_have_one_graph_and_other_weights(method: str, tmp_path: Path) -> None:
    one, other = (quantised(tmp_path / str(seed), method, weights(seed)) for seed in (1, 2))
    assert one.record.graphs["model"].canonical == other.record.graphs["model"].canonical
    assert one.graphs["model"].read_bytes() == other.graphs["model"].read_bytes()
    left, right = (export.root / "model.onnx.data" for export in (one, other))
    assert left.stat().st_size == right.stat().st_size
    assert left.read_bytes() != right.read_bytes()


@pytest.mark.parametrize("method", METHODS)
def test_two_graphs_share_their_quantised_weights(method: str, tmp_path: Path) -> None:
    maker = HandMaker(gated, components=("prefill", "decode"))
    found = execute_export(planned(checkpoint(tmp_path / "m", weights()), maker, quantize=method), tmp_path / "out")
    assert (found.root / "decode.onnx.data").stat().st_size == 0
    one, other = (loaded(found.graphs[name]) for name in ("prefill", "decode"))
    assert described(one) == described(other)


@pytest.mark.parametrize("method", METHODS)
def test_a_matrix_that_products_and_a_transpose_read_is_quantised_once_and_kept(method: str, tmp_path: Path) -> None:
    square = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    found = checkpoint(tmp_path / "m", {"s.weight": square})
    exported = execute_export(planned(found, HandMaker(square_thrice), quantize=method), tmp_path / "out")
    model = loaded(exported.graphs["model"])
    names = [tensor.name for tensor in model.graph.initializer]
    assert len(names) == len(set(names))
    assert "S" in names
    product = "MatMulInteger" if method == "int8" else "MatMulNBits"
    operators = [node.op_type for node in model.graph.node]
    assert operators.count(product) == 2
    assert operators.count("MatMul") == 1  # behind the Transpose
    (weight,) = exported.record.quantised.weights
    assert (weight.initializer, weight.is_quantised, weight.n_bytes_before) == ("S", True, square.nbytes)
    assert weight.n_bytes > square.nbytes
    session = onnxruntime.InferenceSession(str(exported.graphs["model"]), providers=["CPUExecutionProvider"])
    x = torch.randn(3, 8)
    y = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
    expected = x @ square @ square @ square.T
    assert (y - expected).norm() < 0.3 * expected.norm()


def test_the_record_says_what_was_quantised_what_stayed_and_how(tmp_path: Path) -> None:
    found = quantised(tmp_path, "int4", block_size=16)
    said = found.record.quantised
    assert said is not None
    assert {weight.initializer: weight.is_quantised for weight in said.weights} == {
        "A": True,
        "B": True,
        "C": True,
        "norm.weight": False,
    }
    assert said.n_bytes_before == sum(tensor.nbytes for tensor in weights().values())
    assert said.n_bytes == sum(weight.n_bytes for weight in said.weights)
    assert said.n_bytes < 0.5 * said.n_bytes_before
    expected = Quantisation(method="int4", block_size=16, is_symmetric=False, accuracy_level=4)
    assert found.record.options["quantisation"] == expected.model_dump()
    assert found.record.versions["onnxruntime"] == onnxruntime.__version__


def test_the_same_command_gives_the_same_bytes_and_finds_them_done(tmp_path: Path) -> None:
    first, second = (quantised(tmp_path / name, "int4") for name in "ab")
    assert digests(first.root) == digests(second.root)
    assert quantised(tmp_path / "a", "int4").was_done
    with pytest.raises(Exception, match="holds another export"):
        quantised(tmp_path / "a", "int8")


def test_quantised_graphs_go_beside_the_others(tmp_path: Path) -> None:
    found = checkpoint(tmp_path / "m")
    assert default_output(planned(found)) == found.root / "onnx"
    assert default_output(planned(found, quantize="int8-blockwise")) == found.root / "onnx-int8-blockwise"


@pytest.mark.parametrize("method", METHODS)
def test_replay_quantises_again_and_names_a_changed_byte(method: str, tmp_path: Path) -> None:
    found = checkpoint(tmp_path / "m", weights())
    out = execute_export(planned(found, HandMaker(gated), quantize=method), tmp_path / "out").root
    source = CheckpointSource(found, {})
    assert list(replay_export(source, out)) == []
    data = out / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[3] ^= 16
    data.write_bytes(content)
    assert list(replay_export(source, out)) == [f"model.onnx.data: byte 0: is not a.weight (transposed, {method})"]


def test_replay_names_a_part_that_reads_another_place(tmp_path: Path) -> None:
    found = checkpoint(tmp_path / "m", weights())
    out = execute_export(planned(found, HandMaker(gated), quantize="int4"), tmp_path / "out").root
    model = onnx.load(out / "model.onnx", load_external_data=False)
    one, other = (t for t in model.graph.initializer if t.name in {"A_scales", "C_scales"})
    for mine, theirs in zip(one.external_data, other.external_data, strict=True):
        mine.value, theirs.value = theirs.value, mine.value
    (out / "model.onnx").write_bytes(model.SerializeToString())
    said = list(replay_export(CheckpointSource(found, {}), out))
    assert [entry.split(": ")[1] for entry in said] == ["A_scales", "C_scales"]


def test_a_graph_without_products_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    def no_product(tensors: Mapping[str, Tensor]) -> Any:
        model = stored({**tensors})
        del model.graph.node[2:]
        model.graph.node.append(helper.make_node("Gemm", ["n", "val_2"], ["y"]))
        return model

    plan = planned(checkpoint(tmp_path / "m"), HandMaker(no_product), quantize="int4")
    with pytest.raises(ExportError, match="nothing to quantise") as raised:
        execute_export(plan, tmp_path / "out")
    assert raised.value.code == "nothing-to-quantise"
    assert not (tmp_path / "out").exists()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a block of no power of two": ({"quantize": "int4", "block_size": 24}, "found 24, expected a power of two"),
    "a block below 16": ({"quantize": "int4", "block_size": 8}, "16, 32, 64, 128, 256"),
    "a block that no kernel knows": ({"quantize": "int8-blockwise", "block_size": 512}, "found 512"),
    "blocks of dynamic quantisation": ({"quantize": "int8", "block_size": 32}, "no blocks"),
    "zero points of dynamic quantisation": ({"quantize": "int8", "is_symmetric": False}, "no blocks"),
    "dynamic quantisation elsewhere": ({"quantize": "int8", "provider": "cuda"}, "on the CPU, not on cuda"),
    "dynamic quantisation of float16": ({"quantize": "int8", "dtype": "float16"}, "float32 activations only"),
    "options of nothing": ({"block_size": 32}, "nothing is to be quantised"),
    "the checkpoint's own files": ({"quantize": "int4", "storage": "shared"}, "hold no quantised weights"),
    "an unknown method": ({"quantize": "int3"}, "found int3, expected int4"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused_before_anything_is_made(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    dtype = torch.float16 if options.get("dtype") == "float16" else torch.float32
    with pytest.raises(ExportError, match=message):
        planned(checkpoint(tmp_path / "m", weights(dtype=dtype)), **options)


def test_what_is_not_quantised_has_the_identity_that_it_had(tmp_path: Path) -> None:
    plan = planned(checkpoint(tmp_path / "m"))
    said = json.dumps(plan.identity(None), default=str)
    assert "quant" not in said
    assert "block_size" not in said


def test_the_tools_leave_the_log_as_it_was_and_their_templates_hold_no_weights() -> None:
    root = logging.getLogger()
    before = (list(root.handlers), root.level, root.manager.disable)
    rewriting.cache_clear()
    made = rewriting((32, 48), torch.float32, Quantisation(method="int4", block_size=32, is_symmetric=False))
    assert (list(root.handlers), root.level, root.manager.disable) == before
    assert not any(tensor.raw_data for tensor in made.parts.values())
    assert made.n_bytes == sum(span.n_bytes for span in made.spans.values())
