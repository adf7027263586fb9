"""Which tensors an export is seen to hold: by what reads an initializer, never by its shape."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from onnx import helper
from torch import Tensor

from lora_deploy.errors import InputError, MalformedCheckpointError, UnsafeFileError
from lora_deploy.export.existing.base import OnnxBase
from lora_deploy.export.existing.open import is_onnx_base, open_onnx_base
from lora_deploy.rounding import torch_dtype
from tests.unit.export.foreign import LAYER, SIZE, K, Q, V, matrix, node, optimum, plain_tensors, scoped, write

W = matrix(1)
_NAMED = f"{Q}.weight"
_NODE = "/model/layers.0/self_attn/q_proj/Op"


def tensors_of(base: OnnxBase) -> dict[str, Tensor]:
    return {
        name: torch.frombuffer(bytearray(base.read(name)), dtype=torch_dtype(spec.dtype)).reshape(spec.shape)
        for name, spec in base.tensors.items()
    }


def opened(folder: Path, weights: Mapping[str, Tensor], nodes: list[Any], **options: Any) -> dict[str, Tensor]:
    return tensors_of(open_onnx_base(write(folder, weights, nodes, **options)))


@pytest.mark.parametrize("data", [None, "model.onnx.data"])
def test_the_second_factor_of_a_product_is_in_out(tmp_path: Path, data: str | None) -> None:
    found = opened(tmp_path, *optimum(plain_tensors()), data=data)
    assert found.keys() == plain_tensors().keys()
    assert all(torch.equal(found[name], value) for name, value in plain_tensors().items())


@pytest.mark.parametrize(
    ("nodes", "is_turned"),
    [
        ([node("MatMul", ["x", "w"], "y", _NODE)], True),
        ([node("Gemm", ["x", "w"], "y", _NODE, transB=1)], False),
        ([node("Gemm", ["x", "w"], "y", _NODE)], True),
        ([node("Transpose", ["w"], "t", perm=[1, 0]), node("MatMul", ["x", "t"], "y", _NODE)], False),
        ([node("Transpose", ["w"], "t"), node("Gemm", ["x", "t"], "y", _NODE, transB=1)], True),
        ([node("FusedMatMul", ["x", "w"], "y", _NODE, domain="com.microsoft", transB=1)], False),
        ([node("Identity", ["w"], "i"), node("MatMul", ["x", "i"], "y", _NODE)], True),
        ([node("Gather", ["w", "x"], "y", _NODE)], False),
        ([node("Transpose", ["w"], "t"), node("Gather", ["t", "x"], "y", _NODE)], True),
        ([scoped("MatMul", ["x", "w"], "y", Q)], True),
    ],
)
def test_a_square_matrix_lies_as_its_reader_says(tmp_path: Path, nodes: list[Any], is_turned: bool) -> None:
    assert torch.equal(opened(tmp_path, {"w": W}, nodes)[_NAMED], W.T if is_turned else W)


@pytest.mark.parametrize(
    "nodes",
    [
        [node("MatMul", ["w", "x"], "y", _NODE)],
        [node("Add", ["x", "w"], "y", _NODE)],
        [node("Gather", ["w", "x"], "y", _NODE, axis=1)],
        [node("MatMul", ["x", "w"], "h", _NODE), node("Gemm", ["h", "w"], "y", _NODE, transB=1)],
        [node("MatMul", ["x", "w"], "h", _NODE), node("Mul", ["h", "w"], "y", "/other/Mul")],
        [node("MatMul", ["x", "w"], "y", "MatMul_7")],
        [node("Gemm", ["x", "w"], "y", _NODE, alpha=0.5)],
        [node("FusedMatMul", ["x", "w"], "y", _NODE, domain="com.microsoft", alpha=0.5)],
    ],
)
def test_what_no_reader_explains_is_no_tensor(tmp_path: Path, nodes: list[Any]) -> None:
    assert opened(tmp_path, {"w": W}, nodes) == {}


def test_conv1d_keeps_the_checkpoints_layout_where_the_configuration_says_so(tmp_path: Path) -> None:
    name = "transformer.h.0.attn.c_proj.weight"
    nodes = [node("Gemm", ["x", name], "y", "/transformer/h.0/attn/c_proj/Gemm")]
    gpt2 = {"model_type": "gpt2"}
    assert torch.equal(opened(tmp_path / "known", {name: W}, nodes, config=gpt2)[name], W)
    base = open_onnx_base(write(tmp_path / "unknown", {name: W}, nodes, config=None))
    assert torch.equal(tensors_of(base)[name], W.T)
    assert base.is_out_in


def test_a_reader_names_a_tensor_that_the_exporter_called_after_another(tmp_path: Path) -> None:
    weights = {"lm_head.weight": W, "val_1": W.T}
    nodes = [
        scoped("Gather", ["lm_head.weight", "x"], "h", "model.embed_tokens"),
        scoped("MatMul", ["h", "val_1"], "y", "lm_head"),
    ]
    base = open_onnx_base(write(tmp_path, weights, nodes))
    assert set(base.tensors) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert base.aliases == ()


def test_a_module_around_a_parameter_does_not_rename_it(tmp_path: Path) -> None:
    found = opened(tmp_path, {"model.proj.weight": W}, [scoped("MatMul", ["x", "model.proj.weight"], "y", "model")])
    assert set(found) == {"model.proj.weight"}


def test_one_matrix_of_two_modules_has_two_names(tmp_path: Path) -> None:
    nodes = [
        scoped("Gather", ["w", "x"], "h", "model.embed_tokens"),
        scoped("Transpose", ["w"], "t", "lm_head"),
        scoped("MatMul", ["h", "t"], "y", "lm_head"),
    ]
    base = open_onnx_base(write(tmp_path, {"w": W}, nodes))
    assert base.aliases == (("model.embed_tokens.weight", "lm_head.weight"),)
    assert all(torch.equal(value, W) for value in tensors_of(base).values())


def packed(n_queries: int = 2, n_keys: int = 1) -> tuple[dict[str, Tensor], list[Any]]:
    """Queries, keys and values side by side, as onnxruntime-genai's builder packs them: heads of four features."""
    heads = (n_queries, n_keys, n_keys)
    parts = [matrix(seed, 4 * n, SIZE) for seed, n in enumerate(heads)]
    weights = {
        f"{LAYER}.attn.qkv_proj.MatMul.weight": torch.cat(parts).T,
        f"{LAYER}.attn.qkv_proj.Add.bias": torch.cat([part[:, 0] for part in parts]),
        f"{LAYER}.input_layernorm.weight": torch.ones(SIZE),
    }
    product, bias, norm = weights
    name = "/model/layers.0/attn/qkv_proj"
    attributes = {"domain": "com.microsoft", "num_heads": n_queries, "kv_num_heads": n_keys}
    nodes = [
        node("SimplifiedLayerNormalization", ["x", norm], "n", "/model/layers.0/input_layernorm/LayerNorm"),
        node("MatMul", ["n", product], "h", f"{name}/MatMul"),
        node("Add", ["h", bias], "b", f"{name}/Add"),
        node("GroupQueryAttention", ["b", "", ""], "y", "/model/layers.0/attn/GroupQueryAttention", **attributes),
    ]
    return weights, nodes


def test_packed_projections_are_taken_apart_by_the_heads_of_their_attention(tmp_path: Path) -> None:
    found = opened(tmp_path, *packed())
    for seed, (module, n_heads) in enumerate(((Q, 2), (K, 1), (V, 1))):
        assert torch.equal(found[f"{module}.weight"], matrix(seed, 4 * n_heads, SIZE))
        assert torch.equal(found[f"{module}.bias"], matrix(seed, 4 * n_heads, SIZE)[:, 0])
    assert not any("norm" in name for name in found), "the builder may have added one to it"


def test_packed_projections_without_an_attention_behind_them_are_not_explained(tmp_path: Path) -> None:
    weights, nodes = packed()
    nodes[-1] = node("Relu", ["b"], "y", "/model/layers.0/attn/Relu")
    base = open_onnx_base(write(tmp_path, weights, nodes))
    assert base.tensors == {}
    assert "packed, and no attention tells the sizes" in base.findings[0].message


def test_quantised_weights_are_named_with_the_reason(tmp_path: Path) -> None:
    operator = node("MatMulNBits", ["x", "w_Q4"], "y", _NODE, domain="com.microsoft", K=8, N=8, bits=4, block_size=16)
    base = open_onnx_base(write(tmp_path, {"w_Q4": torch.ones(8, 1, 8, dtype=torch.uint8)}, [operator]))
    assert base.tensors == {}
    assert [finding.target for finding in base.findings] == [_NAMED]
    assert "quantised, read by com.microsoft.MatMulNBits" in base.findings[0].message


def test_weights_in_branches_are_read_by_what_reads_them_there(tmp_path: Path) -> None:
    branch = helper.make_graph(
        [node("MatMul", ["x", "w"], "b", _NODE)], "then", [], [helper.make_tensor_value_info("b", 1, None)]
    )
    other = helper.make_graph(
        [node("Gemm", ["x", "w"], "c", _NODE, transB=1)], "else", [], [helper.make_tensor_value_info("c", 1, None)]
    )
    both = node("If", ["flag"], "y", then_branch=branch, else_branch=other)
    assert opened(tmp_path / "two", {"w": W}, [both], inputs=("x", "flag")) == {}
    same = node("If", ["flag"], "y", then_branch=branch, else_branch=branch)
    assert torch.equal(opened(tmp_path / "one", {"w": W}, [same], inputs=("x", "flag"))[_NAMED], W.T)


def test_an_encoder_that_was_exported_by_itself_gets_its_place_in_the_model(tmp_path: Path) -> None:
    nodes = [node("MatMul", ["x", "w"], "y", "/block.0/layer.0/SelfAttention/q/MatMul")]
    t5 = {"model_type": "t5", "is_encoder_decoder": True}
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    assert set(opened(tmp_path / "a", {"w": W}, nodes, config=t5, file="encoder_model.onnx")) == {name}
    assert name not in opened(tmp_path / "b", {"w": W}, nodes, config=t5, file="decoder_model.onnx")
    assert name not in opened(tmp_path / "c", {"w": W}, nodes, file="encoder_model.onnx")
    whole = [node("MatMul", ["x", "w"], "y", "/encoder/block.0/layer.0/SelfAttention/q/MatMul")]
    assert set(opened(tmp_path / "d", {"w": W}, whole, config=t5, file="encoder_model.onnx")) == {name}


def test_graphs_that_share_a_file_belong_together_and_others_stay_out(tmp_path: Path) -> None:
    write(tmp_path, *optimum(plain_tensors()))
    content = (tmp_path / "model.onnx").read_bytes()
    (tmp_path / "with_past.onnx").write_bytes(content)
    write(tmp_path, *optimum(plain_tensors()), file="alone.onnx", data="alone.data")
    (tmp_path / "model_fp16.onnx").write_text("version https://git-lfs.github.com/spec/v1")
    assert open_onnx_base(tmp_path / "model.onnx").graphs == ("model.onnx", "with_past.onnx")
    assert open_onnx_base(tmp_path / "alone.onnx").graphs == ("alone.onnx",)
    (tmp_path / "model_fp16.onnx").unlink()
    whole = open_onnx_base(tmp_path)
    assert whole.graphs == ("alone.onnx", "model.onnx", "with_past.onnx")
    assert all(len(views) == 2 for views in whole.views.values()), "of three graphs, two share their weights"


def test_a_folder_of_weights_is_no_export(tmp_path: Path) -> None:
    assert not is_onnx_base(tmp_path)
    write(tmp_path / "onnx", *optimum(plain_tensors()), config=None)
    assert is_onnx_base(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert open_onnx_base(tmp_path).config == {"model_type": "llama"}
    (tmp_path / "model.safetensors").touch()
    assert not is_onnx_base(tmp_path)
    assert is_onnx_base(tmp_path / "onnx" / "model.onnx")


# ---------------------------------------------------------------------------------------------------------- bad input


def _edited(folder: Path, **places: str) -> Path:
    import onnx

    write(folder, *optimum(plain_tensors()))
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        entry.value = places.get(entry.key, entry.value)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "a/../../secret"])
def test_weights_outside_the_folder_are_refused(tmp_path: Path, location: str) -> None:
    (tmp_path / "secret").write_bytes(bytes(4096))
    with pytest.raises(UnsafeFileError, match="leads out of the folder"):
        open_onnx_base(_edited(tmp_path / "export", location=location))


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(4096))
    write(tmp_path / "export", *optimum(plain_tensors()))
    data = tmp_path / "export" / "model.onnx.data"
    data.unlink()
    data.symlink_to(tmp_path / "secret")
    with pytest.raises(UnsafeFileError, match="outside the folder"):
        open_onnx_base(tmp_path / "export")


@pytest.mark.parametrize(
    ("places", "problem"),
    [
        ({"location": "lost.data"}, "no such file"),
        ({"offset": "100000"}, "bytes 100000 to 100256 of model.onnx.data, which has"),
        ({"offset": "-4"}, "bytes -4 to"),
        ({"length": "128"}, r"for F32 \[8, 8\], which needs 256"),
        ({"offset": "a"}, "is no number"),
        ({"offset": "100"}, "belong to two initializers"),
    ],
)
def test_places_that_cannot_be_are_refused(tmp_path: Path, places: dict[str, str], problem: str) -> None:
    with pytest.raises(MalformedCheckpointError, match=problem):
        open_onnx_base(_edited(tmp_path, **places))


def test_a_graph_that_takes_adapters_is_refused(tmp_path: Path) -> None:
    nodes = [node("MatMul", ["x", "q_proj.lora_A.weight"], "y", _NODE)]
    with pytest.raises(InputError, match="has LoRA of its own"):
        open_onnx_base(write(tmp_path, {"q_proj.lora_A.weight": W}, nodes))


def test_a_file_that_is_no_graph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\xff" * 40)
    with pytest.raises(InputError, match="is not an ONNX graph"):
        open_onnx_base(tmp_path / "model.onnx")
