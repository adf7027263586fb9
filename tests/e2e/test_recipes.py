"""Recipes of the package run on tiny models with random weights: what is overridden is only what is large."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from peft import LoraConfig

from lora_deploy.recipe.library import library
from lora_deploy.recipe.read import read_recipe
from tests import pipelines
from tests.e2e.commands import document, settings
from tests.parity.test_decoders import qwen3
from tests.peer.models import clip, gpt2, llama, llava, mixtral, t5, vit, whisper
from tests.peer.small import of_class
from tests.peer.trained import Trained, assert_rounded_once, reload, tensors_of, train
from tests.peer.vision_language import idefics2

STANDINS: dict[str, tuple[Callable[[], Any], LoraConfig]] = {
    "smollm2": (llama, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")),
    "llama-3-8b": (llama, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")),
    "vit": (vit, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])),
    "t5": (t5, LoraConfig(r=4, lora_alpha=8, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")),
}
"""Run always."""
OTHERS: dict[str, tuple[Callable[[], Any], LoraConfig]] = {
    "bloom": (partial(of_class, "BloomForCausalLM"), LoraConfig(r=4, target_modules="all-linear")),
    "clip": (clip, LoraConfig(r=4, target_modules=["q_proj", "out_proj", "fc1"])),
    "gemma": (partial(of_class, "Gemma2ForCausalLM"), LoraConfig(r=4, target_modules="all-linear")),
    "gpt-2": (gpt2, LoraConfig(r=4, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)),
    "idefics": (idefics2, LoraConfig(r=4, target_modules=["q_proj", "down_proj", "fc2"])),
    "llava": (llava, LoraConfig(r=4, target_modules=r".*(language_model|vision_tower).*(q_proj|fc1|up_proj)")),
    "mistral-7b": (partial(of_class, "MistralForCausalLM"), LoraConfig(r=4, target_modules="all-linear")),
    "mixtral-8x7b": (mixtral, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])),
    "phi": (partial(of_class, "Phi3ForCausalLM"), LoraConfig(r=4, target_modules=["qkv_proj", "gate_up_proj"])),
    "qwen3": (qwen3, LoraConfig(r=4, target_modules="all-linear")),
    "whisper": (whisper, LoraConfig(r=4, target_modules=["q_proj", "fc1", "out_proj"])),
}
PIPELINES: dict[str, tuple[Callable[[Path], Path], str, Any, tuple[str, ...]]] = {
    "stable-diffusion-1.5": (pipelines.stable_diffusion, "unet", UNet2DConditionModel, pipelines.UNET_TARGETS),
    "sdxl": (pipelines.stable_diffusion_xl, "unet", UNet2DConditionModel, pipelines.UNET_TARGETS),
    "flux": (pipelines.flux, "transformer", FluxTransformer2DModel, pipelines.FLUX_TARGETS),
}
CHEAP = [
    *("--set", "export=false", "--set", "evidence.only=[replay]"),
    *("--set", "release.accept={code: parity-missing, because: a test of weights}"),
]


def chosen_for(adapter: Path, base: Path, folder: Path) -> list[str]:
    said = {
        "adapters": adapter,
        "base": base,
        "output": folder / "dist",
        "release.license": "mit",
        "targets": folder / "published",
    }
    return settings(said)


def standin(name: str, folder: Path) -> tuple[Trained, list[str]]:
    model, config = (STANDINS | OTHERS)[name]
    trained = train(model(), config, folder)
    return trained, chosen_for(trained.adapter, trained.base, folder)


def test_every_recipe_has_a_standin() -> None:
    assert sorted([*STANDINS, *OTHERS, *PIPELINES]) == sorted(library())


@pytest.mark.parametrize("name", [*STANDINS, *(pytest.param(name, marks=pytest.mark.nightly) for name in OTHERS)])
def test_weights_of_a_recipe_are_merged_as_trained_proven_released_and_pushed(name: str, tmp_path: Path) -> None:
    trained, chosen = standin(name, tmp_path)
    found = document("run", name, *chosen, *CHEAP)
    assert [o["stage"] for o in found["outcomes"]] == ["validate", "merge", "evidence", "release", "push"]
    assert {o["verdict"] for o in found["outcomes"]} == {"pass"}
    dtype = next(t.dtype for t in tensors_of(tmp_path / "published").values())
    assert str(dtype) == f"torch.{read_recipe(library()[name]).dtypes[0]}"
    loaded = reload(trained.bare, tmp_path / "published").state_dict()
    exact = trained.merged()
    assert_rounded_once({key: tensor.to(dtype) for key, tensor in loaded.items()}, exact)
    assert any(not exact[key].equal(value) for key, value in trained.bare.state_dict().items())


@pytest.mark.nightly
@pytest.mark.parametrize("name", PIPELINES)
def test_a_component_of_a_pipeline_is_merged_as_trained_and_the_others_travel(name: str, tmp_path: Path) -> None:
    build, component, cls, targets = PIPELINES[name]
    base = build(tmp_path / "base")
    model = cls.from_pretrained(base / component).double()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    trained = pipelines.train(model, tmp_path / "adapter", targets)
    found = document("run", name, *chosen_for(tmp_path / "adapter", base, tmp_path), *CHEAP)
    assert {o["verdict"] for o in found["outcomes"]} == {"pass"}
    published = tmp_path / "published"
    merged, exact = tensors_of(published / component), trained.merge_and_unload().state_dict()
    assert {str(tensor.dtype) for tensor in merged.values()} == {f"torch.{read_recipe(library()[name]).dtypes[0]}"}
    assert_rounded_once(merged, exact)
    assert any(not exact[key].equal(value) for key, value in before.items())
    others = {path.parent.name for path in base.glob("*/*.safetensors")} - {component}
    assert others
    for other in others:
        assert tensors_of(published / other).keys() == tensors_of(base / other).keys()


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["smollm2", "vit"])
def test_a_recipe_makes_graphs_and_proves_them(name: str, tmp_path: Path) -> None:
    # The latency of a model this small is noise: it is left out.
    _, chosen = standin(name, tmp_path)
    skipped = [
        "--set",
        "evidence.skip=[latency]",
        "--set",
        "release.accept={code: latency-missing, because: too small}",
    ]
    found = document("run", name, *chosen, *skipped)
    assert {o["stage"]: o["verdict"] for o in found["outcomes"]} == dict.fromkeys(
        ["validate", "merge", "export", "evidence", "release", "push"], "pass"
    )
    assert list((tmp_path / "published/onnx").rglob("*.onnx"))
