"""Every option of PEFT 0.21.2's LoRA that changes a merge, on a language model's linear layers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftModel
from peft.tuners.lora import config as lora_config
from torch import nn

from lora_deploy.adapters.open import read_adapter
from lora_deploy.errors import IncompatibleAdapterError
from tests.peer.models import gpt2, llama, qwen2, token_ids
from tests.peer.trained import (
    SINGLE_FACTORISATION,
    Trained,
    assert_merges_as_trained,
    merge,
    train,
)

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
CONV1D = ["c_attn", "c_proj", "c_fc"]


@dataclass(frozen=True)
class Variant:
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    model: Callable[[], nn.Module] = llama
    targets: list[str] | str = field(default_factory=lambda: LINEAR)
    noise: float = 0


PATTERNS = {
    "suffix": {"rank_pattern": {"q_proj": 2, "down_proj": 5}},
    "whole path behind an anchor": {"rank_pattern": {"^model.layers.0.self_attn.q_proj": 2}},
    "anchor that matches no suffix": {"rank_pattern": {"^layers.0.self_attn.q_proj": 2}},
    "no match across a name": {"rank_pattern": {"proj": 2, "_proj": 5}},
    "dot is any character": {"rank_pattern": {"q.proj": 2}},
    "alternation": {"rank_pattern": {"q_proj|v_proj": 2, "mlp.(gate|up)_proj": 4}},
    "layer range": {"rank_pattern": {r"layers\.[1-9]\.mlp\..*": 2}},
    "ranks and alphas apart": {
        "rank_pattern": {"q_proj": 2, "layers.0.*k_proj": 6},
        "alpha_pattern": {"layers.1.*q_proj": 9, "self_attn.k_proj": 2.5},
    },
    "first of two": {"alpha_pattern": {"layers.0.self_attn.q_proj": 9, "q_proj": 3}},
    "first of two that sort the other way round": {"rank_pattern": {"q_proj": 2, "layers.0.self_attn.q_proj": 4}},
    "rank-stabilised": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 7}, "use_rslora": True},
    "magnitudes": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 7}, "use_dora": True},
}
VARIANTS = [
    Variant("all linear layers"),
    Variant("all-linear", targets="all-linear"),
    Variant("regular expression", targets=r".*layers\.1\.(self_attn|mlp)\.(?!k_)\w+_proj"),
    Variant("some layers", {"layers_to_transform": [1]}),
    Variant("rsLoRA", {"use_rslora": True}),
    Variant("gaussian start", {"init_lora_weights": "gaussian"}),
    Variant("orthogonal start", {"init_lora_weights": "orthogonal", "r": 4}),
    *(Variant(f"patterns: {name}", options) for name, options in PATTERNS.items()),
    Variant("DoRA", {"use_dora": True}),
    Variant("rank-stabilised DoRA", {"use_dora": True, "use_rslora": True}),
    Variant("layers with a bias", model=qwen2),
    Variant("lora_bias", {"lora_bias": True}, qwen2, ["q_proj", "k_proj", "v_proj"]),
    Variant("all biases", {"bias": "all"}, qwen2, ["q_proj", "up_proj"]),
    Variant("biases of adapted layers", {"bias": "lora_only"}, qwen2, ["q_proj", "k_proj", "up_proj"]),
    Variant("biases and magnitudes", {"bias": "all", "use_dora": True}, qwen2),
    Variant("Conv1D", {"fan_in_fan_out": True}, gpt2, CONV1D),
    Variant("Conv1D, flag not set", {"fan_in_fan_out": False}, gpt2, CONV1D),
    Variant("linear layers, flag set", {"fan_in_fan_out": True}),
    Variant("Conv1D, DoRA", {"use_dora": True, "fan_in_fan_out": True}, gpt2, CONV1D),
    Variant("Conv1D, lora_bias", {"lora_bias": True, "fan_in_fan_out": True}, gpt2, CONV1D),
    Variant("Conv1D, all biases", {"bias": "all", "fan_in_fan_out": True}, gpt2, CONV1D),
    Variant("PiSSA", {"init_lora_weights": "pissa"}, noise=SINGLE_FACTORISATION),
    Variant("PiSSA, DoRA", {"init_lora_weights": "pissa", "use_dora": True}, noise=SINGLE_FACTORISATION),
    Variant("PiSSA, rsLoRA", {"init_lora_weights": "pissa", "use_rslora": True}, noise=SINGLE_FACTORISATION),
    Variant(
        "PiSSA, Conv1D", {"init_lora_weights": "pissa", "fan_in_fan_out": True}, gpt2, CONV1D, SINGLE_FACTORISATION
    ),
    Variant("OLoRA", {"init_lora_weights": "olora"}, noise=SINGLE_FACTORISATION),
    Variant("OLoRA, square Conv1D", {"init_lora_weights": "olora"}, gpt2, ["attn.c_proj"], SINGLE_FACTORISATION),
    Variant("KaSA", {"kasa_config": lora_config.KasaConfig()}, noise=SINGLE_FACTORISATION),
    Variant(
        "BD-LoRA",
        {
            "use_bdlora": lora_config.BdLoraConfig(
                target_modules_bd_a=["o_proj", "down_proj"],
                target_modules_bd_b=["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"],
                nblocks=2,
            ),
            "r": 4,
        },
    ),
    Variant("VeLoRA", {"velora_config": lora_config.VeloraConfig(num_groups=2)}),
    Variant("MonteCLoRA", {"monteclora_config": lora_config.MontecloraConfig(num_samples=2)}),
    Variant("whole block saved", {"modules_to_save": ["mlp"]}, targets=["q_proj"]),
    Variant("norms and head saved", {"modules_to_save": ["lm_head", "input_layernorm", "norm"]}),
    Variant("embedding saved", {"modules_to_save": ["embed_tokens"]}),
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_an_option_merges_to_what_peft_0_21_2_merges_and_computes_what_it_was_trained_to(
    variant: Variant, tmp_path: Path
) -> None:
    options = {"r": 3, "lora_alpha": 5, "target_modules": variant.targets, "task_type": "CAUSAL_LM", **variant.options}
    trained = train(variant.model(), LoraConfig(**options), tmp_path)
    assert_merges_as_trained(trained, token_ids(), tmp_path / "out", noise=variant.noise)


def test_olora_on_a_conv1d_that_is_not_square_is_refused_since_peft_0_21_2_cannot_run_it_either(tmp_path: Path) -> None:
    """PEFT factorises the stored matrix, so that the factors lie the wrong way round for its own forward pass."""
    config = LoraConfig(r=3, init_lora_weights="olora", target_modules=["c_attn"])
    trained = train(gpt2(), config, tmp_path)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        trained.output(token_ids())
    with pytest.raises(IncompatibleAdapterError, match="shape-mismatch"):
        merge(trained.adapter, trained.base, tmp_path / "out")


def _save_with_start(model: nn.Module, config: LoraConfig, folder: Path) -> Trained:
    """Let PEFT save the difference from its start, which makes a plain adapter of twice the rank."""
    start = folder / "start"

    def keep_start(adapted: PeftModel) -> None:
        adapted.peft_config["default"].init_lora_weights = True
        adapted.save_pretrained(start)
        adapted.peft_config["default"].init_lora_weights = config.init_lora_weights

    return train(model, config, folder, before=keep_start, path_initial_model_for_weight_conversion=str(start))


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 7}}]
)
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_an_adapter_that_peft_0_21_2_converted_from_a_residual_start_is_plain(
    init: str, options: dict[str, Any], tmp_path: Path
) -> None:
    config = LoraConfig(r=3, lora_alpha=5, init_lora_weights=init, target_modules=LINEAR, **options)
    trained = _save_with_start(llama(), config, tmp_path)
    saved = json.loads((trained.adapter / "adapter_config.json").read_text())
    assert (saved["init_lora_weights"], saved["r"]) == (True, 6)
    assert_merges_as_trained(trained, token_ids(), tmp_path / "out", noise=1e-5)


def test_alphas_whose_order_peft_0_21_2_loses_when_it_saves_are_reported(tmp_path: Path) -> None:
    """PEFT takes the first key that matches, and sorts the keys into the file: loaded again, another one is first."""
    config = LoraConfig(
        r=3, target_modules=["q_proj"], alpha_pattern={"q_proj": 3, "layers.0.self_attn.q_proj": 9, "layers.1.*": 3}
    )
    trained = train(llama(), config, tmp_path)
    in_training = trained.model.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"]
    adapter = read_adapter(trained.adapter)
    scales = {update.target: update.update.scale.value for update in adapter.updates}
    assert (in_training, scales["model.layers.0.self_attn.q_proj.weight"]) == (1, 3)
    (found,) = (finding for finding in adapter.findings if finding.code == "pattern-order")
    assert found.target == "model.layers.0.self_attn.q_proj"
    assert "matches 1 modules more than once" in found.message
