"""Adapters of llama.cpp: layouts, alpha, names, and the order of rows, against files that the gguf package writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from lora_deploy.adapter import Adapter, RowOrder
from lora_deploy.adapters.interface import ReadOptions
from lora_deploy.adapters.open import read_adapter
from lora_deploy.errors import IncompatibleAdapterError, InputError, MalformedAdapterError, UnmergeableAdapterError
from lora_deploy.updates.low_rank import LowRank
from lora_deploy.updates.replacement import Replacement
from lora_deploy.validate import bind
from tests.builders import make_checkpoint, merged_values

Arrays = dict[str, np.ndarray[Any, Any]]
RNG = np.random.default_rng(5)


def write(
    folder: Path, tensors: Arrays, *, alpha: float | None = 8.0, architecture: str = "llama", **told: str
) -> Path:
    path = folder / "adapter.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(told.get("kind", gguf.GGUFType.ADAPTER))
    writer.add_string(gguf.Keys.Adapter.TYPE, told.get("adapter_kind", "lora"))
    if alpha is not None:
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    if "tokens" in told:
        writer.add_array(gguf.Keys.Adapter.ALORA_INVOCATION_TOKENS, [1, 2])
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def numbers(*shape: int) -> np.ndarray[Any, Any]:
    return RNG.standard_normal(shape).astype(np.float32)


def pair(name: str, out: int = 4, n_in: int = 6, rank: int = 2) -> Arrays:
    return {f"{name}.lora_a": numbers(rank, n_in), f"{name}.lora_b": numbers(out, rank)}


def product(tensors: Arrays, name: str) -> np.ndarray[Any, Any]:
    return tensors[f"{name}.lora_b"].astype(np.float64) @ tensors[f"{name}.lora_a"].astype(np.float64)


def low_rank(adapter: Adapter) -> LowRank:
    update = adapter.updates[0].update
    assert isinstance(update, LowRank)
    return update


def test_a_layer_is_read_with_alpha_over_its_rank(tmp_path: Path) -> None:
    tensors = pair("blk.0.ffn_down.weight")
    adapter = read_adapter(write(tmp_path, tensors))
    assert adapter.format == "gguf"
    assert "model.layers.0.mlp.down_proj.weight" in adapter.updates[0].alternatives
    assert adapter.updates[0].row_order is RowOrder.STORED
    np.testing.assert_allclose(low_rank(adapter).delta(), 4 * product(tensors, "blk.0.ffn_down.weight"))


def test_an_alpha_of_zero_is_a_scale_of_one(tmp_path: Path) -> None:
    adapter = read_adapter(write(tmp_path, pair("blk.0.ffn_down.weight"), alpha=0))
    assert low_rank(adapter).scale.value == 1


def test_an_embeddings_first_factor_is_stored_transposed(tmp_path: Path) -> None:
    tensors = {"token_embd.weight.lora_a": numbers(9, 2), "token_embd.weight.lora_b": numbers(6, 2)}
    adapter = read_adapter(write(tmp_path, tensors, alpha=2))
    expected = tensors["token_embd.weight.lora_a"].astype(np.float64) @ tensors["token_embd.weight.lora_b"].T
    np.testing.assert_allclose(low_rank(adapter).delta(), expected, rtol=1e-6)


@pytest.mark.parametrize("kind", [np.float16, "BF16", "Q8_0"])
def test_other_number_formats_are_read_as_the_package_reads_them(tmp_path: Path, kind: Any) -> None:
    values = {"lora_a": numbers(2, 32), "lora_b": numbers(64, 32)[:, :2].copy()}
    path = tmp_path / "adapter.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 2)
    stored = values["lora_a"]
    if kind is np.float16:
        writer.add_tensor("blk.0.ffn_down.weight.lora_a", stored.astype(np.float16))
        expected = stored.astype(np.float16).astype(np.float64)
    else:
        quantisation = gguf.GGMLQuantizationType[kind]
        packed = gguf.quants.quantize(stored, quantisation)
        writer.add_tensor("blk.0.ffn_down.weight.lora_a", packed, raw_dtype=quantisation)
        expected = gguf.quants.dequantize(packed, quantisation).astype(np.float64)
    writer.add_tensor("blk.0.ffn_down.weight.lora_b", values["lora_b"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = low_rank(read_adapter(path))
    assert np.array_equal(found.down.double().numpy(), expected)


def test_rows_of_q_and_k_are_brought_back_by_the_heads_of_the_base(tmp_path: Path) -> None:
    """4 query heads and 2 key heads of 6 rows each: row 2i and 2i + 1 of a head become i and i + 3."""
    tensors = pair("blk.1.attn_q.weight", 24, 6) | pair("blk.1.attn_k.weight", 12, 6)
    config = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2}
    names = {side: f"model.layers.1.self_attn.{side}_proj.weight" for side in "qk"}
    base = make_checkpoint(tmp_path / "base", {names["q"]: torch.zeros(24, 6), names["k"]: torch.zeros(12, 6)}, config)
    merged = merged_values(bind([read_adapter(write(tmp_path, tensors, alpha=2))], base))
    for side, n_heads in (("q", 4), ("k", 2)):
        paired = product(tensors, f"blk.1.attn_{side}.weight")
        for head in range(n_heads):
            for i in range(3):
                rows = merged[names[side]][6 * head : 6 * head + 6].numpy()
                np.testing.assert_allclose(rows[i], paired[6 * head + 2 * i])
                np.testing.assert_allclose(rows[i + 3], paired[6 * head + 2 * i + 1])


def test_rows_of_an_architecture_without_pairs_stay(tmp_path: Path) -> None:
    adapter = read_adapter(write(tmp_path, pair("blk.0.attn_q.weight"), architecture="qwen2"))
    assert adapter.updates[0].row_order is RowOrder.STORED


def test_a_base_without_heads_cannot_take_paired_rows(tmp_path: Path) -> None:
    adapter = read_adapter(write(tmp_path, pair("blk.0.attn_q.weight")))
    base = make_checkpoint(
        tmp_path / "base", {"model.layers.0.self_attn.q_proj.weight": torch.zeros(4, 6)}, {"model_type": "llama"}
    )
    with pytest.raises(IncompatibleAdapterError, match="names none"):
        bind([adapter], base)


@pytest.mark.parametrize("fused", [False, True], ids=["one by one", "fused"])
def test_experts_are_found_one_by_one_and_fused(tmp_path: Path, fused: bool) -> None:
    stack = "blk.0.ffn_up_exps.weight"
    tensors = {f"{stack}.lora_a": numbers(3, 2, 6), f"{stack}.lora_b": numbers(3, 4, 2)}
    adapter = read_adapter(write(tmp_path, tensors, alpha=2, architecture="qwen3moe"))
    module = "model.layers.0.mlp.experts"
    stored = (
        {f"{module}.gate_up_proj": torch.zeros(3, 8, 6)}
        if fused
        else {f"{module}.{e}.{p}_proj.weight": torch.zeros(4, 6) for e in range(3) for p in ("gate", "up")}
    )
    merged = merged_values(bind([adapter], make_checkpoint(tmp_path / "base", stored, {"model_type": "qwen3_moe"})))
    for e in range(3):
        expected = tensors[f"{stack}.lora_b"][e].astype(np.float64) @ tensors[f"{stack}.lora_a"][e].astype(np.float64)
        found = merged[f"{module}.gate_up_proj"][e, 4:] if fused else merged[f"{module}.{e}.up_proj.weight"]
        np.testing.assert_allclose(found, expected)


def test_a_norm_replaces_and_gemmas_loses_the_one_that_the_converter_added(tmp_path: Path) -> None:
    norm = numbers(6)
    for architecture, expected in (("llama", norm), ("gemma2", norm - 1)):
        tensors = pair("blk.0.ffn_down.weight") | {"blk.0.attn_norm.weight": norm}
        adapter = read_adapter(write(tmp_path, tensors, architecture=architecture))
        (update,) = (found.update for found in adapter.updates if isinstance(found.update, Replacement))
        assert np.array_equal(update.values.numpy(), expected)


def test_what_the_converter_lost_is_said(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"use_rslora": True, "lora_alpha": 8, "r": 2}))
    tensors = pair("blk.0.ffn_down.weight") | pair("blk.0.ffn_up.weight", rank=3)
    codes = [finding.code for finding in read_adapter(write(tmp_path, tensors)).findings]
    assert codes == ["scale-lost", "ranks-differ"]


BROKEN: dict[str, tuple[Arrays, dict[str, Any], type[InputError], str]] = {
    "a model": (pair("blk.0.ffn_up.weight"), {"kind": "model"}, MalformedAdapterError, "expected 'adapter', 'lora'"),
    "another adapter": (pair("blk.0.ffn_up.weight"), {"adapter_kind": "ia3"}, MalformedAdapterError, "'ia3'"),
    "aLoRA": (pair("blk.0.ffn_up.weight"), {"tokens": "yes"}, UnmergeableAdapterError, "invocation tokens"),
    "no alpha": (pair("blk.0.ffn_up.weight"), {"alpha": None}, MalformedAdapterError, "no adapter.lora.alpha"),
    "one factor": ({"blk.0.ffn_up.weight.lora_a": numbers(2, 3)}, {}, MalformedAdapterError, "has only lora_a"),
    "no factor": ({"blk.0.attn_norm.weight": numbers(3)}, {}, MalformedAdapterError, "no lora_a and lora_b"),
    "unknown tensor": (pair("blk.0.mystery.weight"), {}, MalformedAdapterError, "is no tensor of llama.cpp's llama"),
    "unknown architecture": (
        pair("blk.0.ffn_up.weight"),
        {"architecture": "marvin"},
        MalformedAdapterError,
        "'marvin' is none of gguf",
    ),
    "rows of unknown order": (
        pair("blk.0.attn_q.weight"),
        {"architecture": "plamo"},
        UnmergeableAdapterError,
        "not known here",
    ),
    "a fused projection taken apart": (
        pair("blk.0.attn_qkv.weight"),
        {"architecture": "falcon"},
        UnmergeableAdapterError,
        "reorders the fused q, k, v",
    ),
}


@pytest.mark.parametrize("case", BROKEN.values(), ids=BROKEN)
def test_what_breaks_the_rules_is_refused(
    tmp_path: Path, case: tuple[Arrays, dict[str, Any], type[InputError], str]
) -> None:
    tensors, told, error, message = case
    with pytest.raises(error, match=message):
        read_adapter(write(tmp_path, tensors, **told))


def test_an_alpha_of_the_user_wins_and_is_warned_of(tmp_path: Path) -> None:
    adapter = read_adapter(write(tmp_path, pair("blk.0.ffn_up.weight")), ReadOptions(alpha=6))
    assert low_rank(adapter).scale.value == 3
    assert [finding.code for finding in adapter.findings] == ["alpha-overridden"]
