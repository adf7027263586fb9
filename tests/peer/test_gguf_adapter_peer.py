"""GGUF adapters, with transformers' own GGUF loader as the oracle.

A llama and its merged self are written as llama.cpp has them, names and paired rows included, and loaded by
transformers, which undoes both by itself; what we merge into the first must be the second.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, GgufConfig

from tests.peer.trained import merge, tensors_of

HIDDEN, HEADS, KEYS, HEAD, INNER, VOCAB, RANK = 32, 4, 2, 8, 48, 64, 3
ALPHA = 5.0
Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(11)
SHAPES = {
    "attn_q": (HEADS * HEAD, HIDDEN),
    "attn_k": (KEYS * HEAD, HIDDEN),
    "attn_v": (KEYS * HEAD, HIDDEN),
    "attn_output": (HIDDEN, HEADS * HEAD),
    "ffn_gate": (INNER, HIDDEN),
    "ffn_up": (INNER, HIDDEN),
    "ffn_down": (HIDDEN, INNER),
}


def _numbers(*shape: int) -> Array:
    return (RNG.standard_normal(shape) * 0.3).astype(np.float32)


def _weights() -> dict[str, Array]:
    weights = {
        "token_embd.weight": _numbers(VOCAB, HIDDEN),
        "output.weight": _numbers(VOCAB, HIDDEN),
        "output_norm.weight": _numbers(HIDDEN),
    }
    for k in range(2):
        weights |= {f"blk.{k}.{name}.weight": _numbers(*shape) for name, shape in SHAPES.items()}
        weights |= {f"blk.{k}.{name}.weight": _numbers(HIDDEN) for name in ("attn_norm", "ffn_norm")}
    return weights


def _write_model(path: Path, weights: dict[str, Array]) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEYS)
    writer.add_vocab_size(VOCAB)
    writer.add_rope_dimension_count(HEAD)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{k}" for k in range(VOCAB)])
    writer.add_token_scores([0.0] * VOCAB)
    writer.add_token_types([1] * VOCAB)
    _finish(writer, weights)


def _write_adapter(path: Path, factors: dict[str, Array]) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, ALPHA)
    _finish(writer, factors)


def _finish(writer: Any, tensors: dict[str, Array]) -> None:
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _load(path: Path) -> Any:
    plain = GgufConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, quantization_config=plain
    )


def test_an_adapter_of_llama_cpp_merges_into_what_transformers_loads_from_the_merged_model(tmp_path: Path) -> None:
    weights = _weights()
    adapted = [*(f"blk.{k}.{name}" for k in range(2) for name in SHAPES), "output", "token_embd"]
    factors: dict[str, Array] = {}
    merged = dict(weights)
    for name in adapted:
        out, n_in = weights[f"{name}.weight"].shape
        down, up = _numbers(RANK, n_in), _numbers(out, RANK)
        delta = up.astype(np.float64) @ down.astype(np.float64) * ALPHA / RANK
        merged[f"{name}.weight"] = (weights[f"{name}.weight"] + delta).astype(np.float32)
        is_embedding = name == "token_embd"
        factors[f"{name}.weight.lora_a"] = up if is_embedding else down
        factors[f"{name}.weight.lora_b"] = np.ascontiguousarray(down.T) if is_embedding else up
    _write_model(tmp_path / "base.gguf", weights)
    _write_model(tmp_path / "merged.gguf", merged)
    _write_adapter(tmp_path / "adapter.gguf", factors)
    _load(tmp_path / "base.gguf").save_pretrained(tmp_path / "base")
    merge(tmp_path / "adapter.gguf", tmp_path / "base", tmp_path / "ours")
    expected = _load(tmp_path / "merged.gguf").state_dict()
    found = tensors_of(tmp_path / "ours")
    assert found.keys() == expected.keys()
    before = tensors_of(tmp_path / "base")
    for name, values in found.items():
        assert (values - expected[name]).abs().max() < 1e-6, name
        if "norm" not in name:
            assert (before[name] - values).abs().max() > 0.1, name
