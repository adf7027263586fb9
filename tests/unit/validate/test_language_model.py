"""A text model's adapter goes into a vision-language base only where the user says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_deploy.checkpoint import Checkpoint
from lora_deploy.errors import IncompatibleAdapterError, RecipeError
from lora_deploy.validate import BindOptions, bind
from tests.builders import linear_adapter, make_checkpoint

TEXT = "model.layers.0.self_attn.q_proj.weight"
INTO = BindOptions(into_language_model=True)
LAYOUTS = {
    "LLaVA on disk": ("llava", "language_model.model.layers.0", "vision_tower.vision_model.encoder.layers.0"),
    "LLaVA in memory": ("llava", "model.language_model.layers.0", "model.vision_tower.encoder.layers.0"),
    "Idefics3": ("idefics3", "model.text_model.layers.0", "model.vision_model.encoder.layers.0"),
    "BLIP-2": ("blip-2", "language_model.model.layers.0", "vision_model.encoder.layers.0"),
    "no configuration": (None, "language_model.model.layers.0", "vision_tower.layers.0"),
}


def base(folder: Path, layout: str) -> tuple[Checkpoint, str]:
    model_type, language, vision = LAYOUTS[layout]
    names = [f"{part}.self_attn.q_proj.weight" for part in (language, vision)]
    tensors = {name: torch.randn(4, 4) for name in names} | {"lm_head.weight": torch.randn(9, 4)}
    return make_checkpoint(folder, tensors, {"model_type": model_type} if model_type else {}), names[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_with_the_option_it_is_merged_into_the_language_model_and_into_nothing_else(
    layout: str, tmp_path: Path
) -> None:
    checkpoint, name = base(tmp_path, layout)
    binding = bind([linear_adapter({TEXT: (4, 4), "lm_head.weight": (9, 4)})], checkpoint, INTO)
    assert set(binding.updates) == {name, "lm_head.weight"}
    assert binding.options == INTO


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_the_option_it_is_refused_and_the_hint_is_the_option(layout: str, tmp_path: Path) -> None:
    checkpoint, _ = base(tmp_path, layout)
    with pytest.raises(IncompatibleAdapterError, match=r"text-model-target +model\.layers\.0") as caught:
        bind([linear_adapter({TEXT: (4, 4)})], checkpoint)
    assert str(caught.value.hint).endswith("--into-language-model")


def test_a_head_inside_the_language_model_is_found_there(tmp_path: Path) -> None:
    names = ["language_model.model.layers.0.self_attn.q_proj.weight", "language_model.lm_head.weight"]
    tensors = {name: torch.randn(4, 4) for name in (*names, "vision_model.encoder.layers.0.self_attn.q_proj.weight")}
    checkpoint = make_checkpoint(tmp_path, tensors, {"model_type": "blip-2"})
    binding = bind([linear_adapter({TEXT: (4, 4), "lm_head.weight": (4, 4)})], checkpoint, INTO)
    assert set(binding.updates) == set(names)


def test_the_names_that_a_base_itself_uses_stay_what_they_are(tmp_path: Path) -> None:
    checkpoint, name = base(tmp_path, "LLaVA on disk")
    binding = bind([linear_adapter({name: (4, 4)})], checkpoint, INTO)
    assert set(binding.updates) == {name}


def test_a_name_that_no_language_model_has_is_still_missing(tmp_path: Path) -> None:
    checkpoint, _ = base(tmp_path, "LLaVA on disk")
    with pytest.raises(IncompatibleAdapterError, match="target-missing"):
        bind([linear_adapter({"model.layers.7.self_attn.q_proj.weight": (4, 4)})], checkpoint, INTO)


def test_another_shape_is_still_a_misfit(tmp_path: Path) -> None:
    checkpoint, _ = base(tmp_path, "LLaVA on disk")
    with pytest.raises(IncompatibleAdapterError, match="shape-mismatch"):
        bind([linear_adapter({TEXT: (6, 4)})], checkpoint, INTO)


@pytest.mark.parametrize("name", [TEXT, "text_model.layers.0.self_attn.q_proj.weight"])
def test_a_base_that_is_nothing_but_a_text_model_cannot_obey(name: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, {name: torch.randn(4, 4)}, {"model_type": "llama"})
    with pytest.raises(RecipeError, match="holds no language model among other parts"):
        bind([linear_adapter({name: (4, 4)})], checkpoint, INTO)
