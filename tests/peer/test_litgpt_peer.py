"""litgpt 0.5.13: its own models with its own LoRA, saved as it saves them, on bases converted by its own converter."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models import falcon, gpt_neox, llama, mixtral, phi, phi3

from tests.peer.trained import in_double, merge, randomize, save_base, tensors_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("litgpt.lora", reason="litgpt is not installed", exc_type=ImportError)
    from litgpt.lora import GPT, Config, lora_filter
    from litgpt.scripts import convert_hf_checkpoint as hf

HIDDEN, INNER, HEADS, KEYS, VOCAB = 32, 48, 4, 2, 96
COMMON: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": 2}
SIZES: dict[str, Any] = {**COMMON, "intermediate_size": INNER, "num_attention_heads": HEADS}
LIT: dict[str, Any] = {
    "n_layer": 2,
    "n_embd": HIDDEN,
    "n_head": HEADS,
    "vocab_size": VOCAB,
    "padded_vocab_size": VOCAB,
    "block_size": 64,
    "intermediate_size": INNER,
    "rotary_percentage": 1.0,
}
ROTATED: dict[str, Any] = {"norm_class_name": "RMSNorm", "bias": False, "parallel_residual": False, "norm_eps": 1e-6}
TOKENS = torch.tensor([[3, 17, 4, 90, 55, 2, 31]])
EVERYTHING = ("query", "key", "value", "projection", "mlp", "head")


@dataclass(frozen=True)
class Case:
    config: Callable[[], PretrainedConfig]
    lit: dict[str, Any]
    convert: Callable[..., None]
    trained: tuple[str, ...] = EVERYTHING


def _llama() -> PretrainedConfig:
    return llama.LlamaConfig(**SIZES, num_key_value_heads=KEYS, tie_word_embeddings=False, max_position_embeddings=64)


def _convert_llama(config: Config, state: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    hf.copy_weights_hf_llama(config, {}, state, weights)


def _convert_phi(config: Config, state: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    hf.copy_weights_phi(config, {}, state, weights)


LLAMA = {**LIT, **ROTATED, "name": "tiny-llama", "n_query_groups": KEYS, "mlp_class_name": "LLaMAMLP"}
CASES = {
    "llama": Case(_llama, LLAMA, _convert_llama),
    **{
        f"llama, {'+'.join(trained)}": Case(_llama, LLAMA, _convert_llama, trained)
        for trained in (("query", "value"), ("key",), ("key", "value"), ("projection", "mlp"))
    },
    "mixtral": Case(
        lambda: mixtral.MixtralConfig(
            **SIZES, num_key_value_heads=KEYS, num_local_experts=3, num_experts_per_tok=2, tie_word_embeddings=False
        ),
        {
            **LLAMA,
            "name": "Mixtral-tiny",
            "mlp_class_name": "LLaMAMoE",
            "n_expert": 3,
            "n_expert_per_token": 2,
            "moe_intermediate_size": INNER,
            "norm_eps": 1e-5,
            "rope_base": 1000000,
        },
        _convert_llama,
    ),
    "pythia": Case(
        lambda: gpt_neox.GPTNeoXConfig(**SIZES, rotary_pct=0.25, max_position_embeddings=64, hidden_act="gelu"),
        {**LIT, "name": "pythia-tiny", "mlp_class_name": "GptNeoxMLP", "rotary_percentage": 0.25},
        hf.copy_weights_gpt_neox,
    ),
    "falcon": Case(
        lambda: falcon.FalconConfig(
            **COMMON,
            num_attention_heads=HEADS,
            ffn_hidden_size=INNER,
            multi_query=True,
            new_decoder_architecture=False,
            parallel_attn=True,
            bias=False,
            alibi=False,
            tie_word_embeddings=False,
        ),
        {
            **LIT,
            "name": "falcon-7b-tiny",
            "mlp_class_name": "GptNeoxMLP",
            "n_query_groups": 1,
            "bias": False,
            "shared_attention_norm": True,
        },
        hf.copy_weights_falcon,
    ),
    "phi-2": Case(
        lambda: phi.PhiConfig(**SIZES, partial_rotary_factor=0.5, max_position_embeddings=64, hidden_act="gelu_new"),
        {
            **LIT,
            "name": "phi-2-tiny",
            "mlp_class_name": "GptNeoxMLP",
            "rotary_percentage": 0.5,
            "shared_attention_norm": True,
            "lm_head_bias": True,
            "gelu_approximate": "tanh",
        },
        _convert_phi,
    ),
    "phi-3": Case(
        lambda: phi3.Phi3Config(
            **SIZES, num_key_value_heads=HEADS, max_position_embeddings=64, pad_token_id=0, tie_word_embeddings=False
        ),
        {**LIT, **ROTATED, "name": "Phi-3-tiny", "mlp_class_name": "LLaMAMLP", "norm_eps": 1e-5},
        _convert_phi,
        ("query", "value", "projection"),
    ),
}


def _train(case: Case, folder: Path) -> tuple[Path, Path, Tensor]:
    model = randomize(AutoModelForCausalLM.from_config(case.config()))
    base = save_base(model, folder / "base")
    trained = {f"lora_{part}": part in case.trained for part in EVERYTHING}
    config = Config(**case.lit, lora_r=3, lora_alpha=7, **trained)
    lit = GPT(config)
    state: dict[str, Tensor] = {}
    weights = {name: tensor.clone() for name, tensor in tensors_of(base).items()}
    case.convert(config, state, weights)
    lit.load_state_dict(state, strict=False)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in lit.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    saved = folder / "final"
    saved.mkdir()
    factors = {name: tensor for name, tensor in lit.state_dict().items() if lora_filter(name, tensor)}
    assert factors
    torch.save({"model": factors}, saved / "lit_model.pth.lora")
    told = {"checkpoint_dir": str(base), "precision": "32-true", "lora_r": 3, "lora_alpha": 7, **trained}
    (saved / "hyperparameters.yaml").write_text(yaml.dump(told))
    plain = {name: value for name, value in asdict(config).items() if not name.startswith("lora_")}
    (saved / "model_config.yaml").write_text(yaml.dump(plain))
    with torch.no_grad():
        return base, saved, lit.eval()(TOKENS).double()


def _logits(folder: Path) -> Tensor:
    model = in_double(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64))
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_merged_weights_answer_as_litgpt_with_its_factors_beside_them(case: Case, tmp_path: Path) -> None:
    base, adapter, expected = _train(case, tmp_path)
    merged = merge(adapter, base, tmp_path / "merged")
    moved = (expected - _logits(base)).abs().max()
    assert moved > 1e-2
    assert (_logits(merged.root) - expected).abs().max() < 1e-3 * moved
