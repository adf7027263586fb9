"""Which graphs a model is cut into, and what they are traced with. Nothing is traced here."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel

from lora_deploy.export.stages import Stage, stages_of
from tests.coverage.architectures import ARCHITECTURES
from tests.peer.models import VOCABULARY, llava
from tests.peer.trained import randomize

pytestmark = pytest.mark.filterwarnings("ignore")


def stages(model: Any) -> dict[str, Stage]:
    assert isinstance(model, PreTrainedModel)
    return {stage.component: stage for stage in stages_of(model.float().eval())}


def windowed() -> MistralForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    return randomize(MistralForCausalLM(MistralConfig(sliding_window=4, **sizes, **heads)))


def test_layers_with_a_window_keep_every_token_in_their_cache() -> None:
    found = stages(windowed())
    assert list(found) == ["prefill", "decode"]
    for given in (found["decode"].inputs, found["decode"].others):
        kept = given["past_key_values"].layers[0].keys.shape[2]
        assert kept == given["attention_mask"].shape[1] - 1 > 4


def test_a_text_with_an_image_is_read_with_it() -> None:
    found = stages(llava())
    assert list(found) == ["prefill", "decode"]
    for given in (found["prefill"].inputs, found["prefill"].others):
        assert given["pixel_values"].shape == (1, 3, 8, 8)
        assert int((given["input_ids"] == 3).sum()) == 4
        assert given["attention_mask"].shape == given["input_ids"].shape
    assert "pixel_values" not in found["decode"].inputs


def test_a_model_that_has_a_part_answer_is_one_graph() -> None:
    found = stages(ARCHITECTURES["blip"].build())
    assert list(found) == ["model"]
    assert {"pixel_values", "input_ids", "attention_mask"} <= set(found["model"].inputs)
