"""What PEFT 0.21.2 saves and no weights of the original base can hold: refused, each with its reason."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from peft.tuners.lora.config import ArrowConfig

from lora_deploy.adapters.interface import ReadOptions
from lora_deploy.adapters.open import read_adapter
from lora_deploy.errors import UnmergeableAdapterError
from tests.peer.models import llama, token_ids
from tests.peer.trained import (
    assert_rounded_once,
    assert_same_output,
    forward,
    merge,
    peft_advice_unheard,
    reload,
    save_base,
    tensors_of,
    train,
)


@dataclass(frozen=True)
class Refused:
    name: str
    reason: str
    options: dict[str, Any] = field(default_factory=dict)
    """What PEFT trains with."""
    written: dict[str, Any] = field(default_factory=dict)
    """What is written into the configuration afterwards, where PEFT needs data or a device to train with it."""


REFUSED = [
    Refused("aLoRA", "active only after its invocation tokens", {"alora_invocation_tokens": [1, 2]}),
    Refused("Arrow", "routes between several adapters", written={"arrow_config": ArrowConfig().__dict__}),
    Refused("QALoRA", "pooled input", written={"use_qalora": True, "qalora_group_size": 4}),
    Refused("PiSSA by random projection", "randomised SVD", {"init_lora_weights": "pissa_niter_4"}),
    Refused("CorDA", "training data", written={"init_lora_weights": "corda"}),
    Refused("LoRA-GA", "training gradients", written={"init_lora_weights": "lora_ga"}),
    Refused("LoftQ", "quantised residual base", written={"init_lora_weights": "loftq"}),
    Refused("a variant of tomorrow", "unknown to peft <= 0.21.2", written={"use_tomorrow": True}),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_an_adapter_that_cannot_be_merged_is_refused_with_its_reason(case: Refused, tmp_path: Path) -> None:
    trained = train(
        llama(), LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM", **case.options), tmp_path
    )
    path = trained.adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | case.written))
    with pytest.raises(UnmergeableAdapterError, match=case.reason):
        read_adapter(trained.adapter)


@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, task_type="CAUSAL_LM"),
    ],
    ids=lambda config: config.peft_type,
)
def test_a_prompt_method_of_peft_0_21_2_is_refused(config: PeftConfig, tmp_path: Path) -> None:
    with peft_advice_unheard():
        get_peft_model(llama(), config).save_pretrained(tmp_path)
    with pytest.raises(UnmergeableAdapterError, match=r"cannot be merged: it adds (virtual tokens|a trained key)"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_4"])
def test_the_residual_base_that_peft_0_21_2_trained_on_takes_such_an_adapter_plainly(init: str, tmp_path: Path) -> None:
    residual = tmp_path / "residual"

    def save_residual(adapted: PeftModel) -> None:
        """The adapted model's own base, taken out from below the adapter."""
        model = llama()
        state = {n.replace(".base_layer", ""): t for n, t in adapted.base_model.model.state_dict().items()}
        model.load_state_dict({n: t for n, t in state.items() if "lora_" not in n})
        save_base(model, residual)

    config = LoraConfig(r=3, lora_alpha=5, init_lora_weights=init, target_modules=["q_proj", "up_proj"])
    trained = train(llama(), config, tmp_path, before=save_residual)
    assert not tensors_of(residual).keys() ^ tensors_of(trained.base).keys()
    merge(trained.adapter, residual, tmp_path / "out", read=ReadOptions(base_is_residual=True))
    loaded, inputs = reload(trained.bare, tmp_path / "out"), token_ids()
    assert_same_output(forward(loaded, inputs), trained.output(inputs), forward(trained.bare, inputs))
    assert_rounded_once({n: t.float() for n, t in loaded.state_dict().items()}, trained.merged())
