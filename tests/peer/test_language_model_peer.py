"""An adapter that PEFT 0.21.2 trained on a text model, merged into a vision-language model that holds that one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import LlamaForCausalLM, MixtralForCausalLM

from lora_deploy.errors import IncompatibleAdapterError
from lora_deploy.validate import BindOptions
from tests.peer.models import llava, mixtral
from tests.peer.trained import assert_rounded_once, in_double, merge, reload, train

INTO = BindOptions(into_language_model=True)


def text_model_of(whole: nn.Module, cls: type[Any]) -> nn.Module:
    """The language model of a vision-language model, as a text model of its own with the same weights."""
    text = cls(whole.config.text_config)
    text.model.load_state_dict(whole.model.language_model.state_dict())
    text.lm_head.load_state_dict(whole.lm_head.state_dict())
    return in_double(text)


def llava_with_experts() -> nn.Module:
    return llava(mixtral().config)


@pytest.mark.parametrize(
    ("whole", "cls", "config"),
    [
        (llava, LlamaForCausalLM, {"target_modules": ["q_proj", "down_proj", "lm_head"]}),
        (llava, LlamaForCausalLM, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}),
        (
            llava_with_experts,
            MixtralForCausalLM,
            {
                "target_modules": ["q_proj"],
                "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            },
        ),
    ],
    ids=["layers and head", "rows of the embedding", "experts"],
)
def test_a_text_models_adapter_makes_the_language_model_what_peft_makes_the_text_model(
    whole: Callable[[], nn.Module], cls: type[nn.Module], config: dict[str, Any], tmp_path: Path
) -> None:
    model = whole()
    base = tmp_path / "whole"
    model.save_pretrained(base)
    trained = train(text_model_of(model, cls), LoraConfig(r=3, lora_alpha=5, **config), tmp_path)
    with pytest.raises(IncompatibleAdapterError) as caught:
        merge(trained.adapter, base, tmp_path / "out")
    assert str(caught.value.hint).endswith("--into-language-model")
    merge(trained.adapter, base, tmp_path / "out", bind_options=INTO)
    loaded = reload(model, tmp_path / "out")
    expected = trained.merged()
    language = {f"model.{name}": t.float() for name, t in loaded.model.language_model.state_dict().items()}
    assert_rounded_once(language | {"lm_head.weight": loaded.lm_head.weight.detach().float()}, expected)
    before, after = (m.model.vision_tower.state_dict() for m in (model, loaded))
    assert all(torch.equal(after[name].float(), t.float()) for name, t in before.items())
