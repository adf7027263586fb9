"""mlx-lm 0.32: its own model with its own adapter, against a transformers model with the weights that we merged.

The oracle is mlx's forward pass with the adapter beside the weights (what training saw), and its ``fuse``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models import gpt2, llama, mixtral, qwen3_moe

from lora_deploy.adapters.interface import ReadOptions
from tests.peer.trained import in_double, merge, randomize, save_base

mx = pytest.importorskip("mlx.core", reason="mlx is not installed (no wheel for this machine, or not asked for)")
pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
from mlx.utils import tree_flatten  # noqa: E402 - behind the question whether it is there
from mlx_lm.tuner.utils import linear_to_lora_layers  # noqa: E402
from mlx_lm.utils import load_model  # noqa: E402

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
    "mlp_only_layers": [],
}
TOKENS = np.array([[3, 17, 4, 90, 55, 2, 31]])


@dataclass(frozen=True)
class Case:
    config: Callable[[], PretrainedConfig]
    keys: tuple[str, ...] | None = None
    kind: str = "lora"
    parameters: dict[str, Any] = field(default_factory=dict)
    old_fields: dict[str, Any] = field(default_factory=dict)
    """What mlx-lm reads from a configuration and transformers 5 no longer writes."""


def _llama(**more: Any) -> Callable[[], PretrainedConfig]:
    return lambda: llama.LlamaConfig(**SIZES, **more)


def _gpt2() -> PretrainedConfig:
    return gpt2.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64)


CASES = {
    "llama, every layer": Case(_llama(tie_word_embeddings=False)),
    "llama, tied embedding": Case(_llama(tie_word_embeddings=True), keys=("self_attn.q_proj", "model.embed_tokens")),
    "llama, untied embedding and head": Case(_llama(tie_word_embeddings=False), keys=("model.embed_tokens", "lm_head")),
    "llama, dora": Case(_llama(tie_word_embeddings=False), kind="dora"),
    "llama, dora of a tied embedding": Case(
        _llama(tie_word_embeddings=True), keys=("self_attn.v_proj", "model.embed_tokens"), kind="dora"
    ),
    "gpt2, which stores (in, out)": Case(_gpt2, old_fields={"n_ctx": 64}),
    "qwen3 experts": Case(
        lambda: qwen3_moe.Qwen3MoeConfig(**SIZES, **EXPERTS, tie_word_embeddings=False),
        old_fields={"num_experts": 4, "rope_theta": 10000.0},
    ),
    "mixtral experts": Case(
        lambda: mixtral.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False)
    ),
}


def _train(case: Case, folder: Path) -> tuple[Any, Path, Path]:
    """A base of transformers, loaded and adapted by mlx-lm, every trainable value moved; the adapter as it saves it."""
    trained = randomize(AutoModelForCausalLM.from_config(case.config()))
    core = trained.transformer if case.config is _gpt2 else trained  # mlx-lm reads gpt2 as the hub has it: h.0.…
    base = save_base(core, folder / "base")
    config_path = base / "config.json"
    config_path.write_text(json.dumps(json.loads(config_path.read_text()) | case.old_fields))
    model, _ = load_model(base)
    model.freeze()
    parameters = {"rank": 4, "scale": 1.5, "dropout": 0.0, **case.parameters}
    if case.keys is not None:
        parameters["keys"] = list(case.keys)
    linear_to_lora_layers(model, 2, parameters, use_dora=case.kind == "dora")
    generator = np.random.default_rng(3)
    moved = {}
    for name, value in tree_flatten(model.trainable_parameters()):
        noise = generator.standard_normal(value.shape).astype(np.float32) * 0.2
        moved[name] = mx.array(noise) if name.endswith(("lora_a", "lora_b")) else value * mx.array(1 + noise)
    assert moved
    model.load_weights(list(moved.items()), strict=False)
    adapter = folder / "adapter"
    adapter.mkdir()
    mx.save_safetensors(str(adapter / "adapters.safetensors"), moved)
    config = {"fine_tune_type": case.kind, "num_layers": 2, "lora_parameters": parameters, "model": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return model, base, adapter


def _logits(folder: Path) -> Tensor:
    model = in_double(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64))
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits


def _close(found: Tensor, expected: Tensor, base: Tensor) -> None:
    moved = (expected - base).abs().max()
    assert moved > 1e-2
    assert (found - expected).abs().max() < 2e-3 * moved


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_merged_weights_answer_as_mlx_with_its_adapter_beside_them(case: Case, tmp_path: Path) -> None:
    model, base, adapter = _train(case, tmp_path)
    model.eval()
    expected = torch.from_numpy(np.array(model(mx.array(TOKENS)).astype(mx.float32))).double()
    merged = merge(adapter, base, tmp_path / "merged")
    _close(_logits(merged.root), expected, _logits(base))


def test_merged_weights_are_those_of_mlx_fuse(tmp_path: Path) -> None:
    model, base, adapter = _train(CASES["llama, every layer"], tmp_path)
    merged = merge(adapter, base, tmp_path / "merged")
    found = AutoModelForCausalLM.from_pretrained(merged.root, dtype=torch.float64).state_dict()
    for name, module in model.named_modules():
        if hasattr(module, "fuse"):
            fused = torch.from_numpy(np.array(module.fuse().weight)).double()
            assert (found[f"{name}.weight"] - fused).abs().max() < 1e-5, name


def test_an_old_alpha_is_ignored_as_mlx_does_and_obeyed_with_the_option(tmp_path: Path) -> None:
    case = Case(_llama(tie_word_embeddings=False), parameters={"alpha": 16.0})
    model, base, adapter = _train(case, tmp_path)
    model.eval()
    before = _logits(base)
    expected = torch.from_numpy(np.array(model(mx.array(TOKENS)))).double()
    _close(_logits(merge(adapter, base, tmp_path / "now").root), expected, before)
    for _, module in model.named_modules():
        if hasattr(module, "fuse"):
            module.scale = 1.5 * 16 / 4
    expected = torch.from_numpy(np.array(model(mx.array(TOKENS)))).double()
    legacy = merge(adapter, base, tmp_path / "then", read=ReadOptions(mlx_legacy_alpha=True))
    _close(_logits(legacy.root), expected, before)


def test_a_full_fine_tune_replaces_what_it_holds(tmp_path: Path) -> None:
    base = save_base(randomize(AutoModelForCausalLM.from_config(_llama(tie_word_embeddings=False)())), tmp_path / "b")
    model, _ = load_model(base)
    trained = {
        name: value + 0.25 for name, value in tree_flatten(model.parameters()) if name.startswith("model.layers.1.")
    }
    model.load_weights(list(trained.items()), strict=False)
    adapter = tmp_path / "full"
    adapter.mkdir()
    mx.save_safetensors(str(adapter / "adapters.safetensors"), trained)
    (adapter / "adapter_config.json").write_text(json.dumps({"fine_tune_type": "full", "num_layers": 1}))
    expected = torch.from_numpy(np.array(model(mx.array(TOKENS)))).double()
    _close(_logits(merge(adapter, base, tmp_path / "merged").root), expected, _logits(base))


def test_bfloat16_arrays_of_an_npz_are_read_as_what_they_are(tmp_path: Path) -> None:
    from lora_deploy.adapters.containers.npz import read_npz

    values = mx.array(np.linspace(-3, 3, 12, dtype=np.float32).reshape(3, 4))
    mx.savez(str(tmp_path / "adapters.npz"), **{"a.lora_a": values.astype(mx.bfloat16), "a.lora_b": values})
    found = read_npz(tmp_path / "adapters.npz")
    assert found["a.lora_a"].dtype == torch.bfloat16
    assert torch.equal(
        found["a.lora_a"].float(), torch.from_numpy(np.array(values.astype(mx.bfloat16).astype(mx.float32)))
    )
    assert torch.equal(found["a.lora_b"], torch.from_numpy(np.array(values)))
