"""Recipes of the package run on tiny models with random weights: what is overridden is only what is large."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from lora_deploy.recipe.library import library
from lora_deploy.recipe.read import read_recipe
from tests.e2e.commands import document
from tests.peer.models import llama, t5, vit
from tests.peer.trained import Trained, assert_rounded_once, reload, tensors_of, train

STANDINS: dict[str, tuple[Callable[[], Any], LoraConfig]] = {
    "smollm2": (llama, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")),
    "llama-3-8b": (llama, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")),
    "vit": (vit, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])),
    "t5": (t5, LoraConfig(r=4, lora_alpha=8, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")),
}
CHEAP = [
    *("--set", "export=false", "--set", "evidence.only=[replay]"),
    *("--set", "release.accept={code: parity-missing, because: a test of weights}"),
]


def standin(name: str, folder: Path) -> tuple[Trained, list[str]]:
    model, config = STANDINS[name]
    trained = train(model(), config, folder)
    said = {
        "adapters": trained.adapter,
        "base": trained.base,
        "output": folder / "dist",
        "release.license": "mit",
        "targets": folder / "published",
    }
    return trained, [word for key, value in said.items() for word in ("--set", f"{key}={value}")]


@pytest.mark.parametrize("name", STANDINS)
def test_weights_of_a_recipe_are_merged_as_trained_proven_released_and_pushed(name: str, tmp_path: Path) -> None:
    trained, settings = standin(name, tmp_path)
    found = document("run", name, *settings, *CHEAP)
    assert [o["stage"] for o in found["outcomes"]] == ["validate", "merge", "evidence", "release", "push"]
    assert {o["verdict"] for o in found["outcomes"]} == {"pass"}
    dtype = next(t.dtype for t in tensors_of(tmp_path / "published").values())
    assert str(dtype) == f"torch.{read_recipe(library()[name]).dtypes[0]}"
    loaded = reload(trained.bare, tmp_path / "published").state_dict()
    exact = trained.merged()
    assert_rounded_once({key: tensor.to(dtype) for key, tensor in loaded.items()}, exact)
    assert any(not exact[key].equal(value) for key, value in trained.bare.state_dict().items())


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["smollm2", "vit"])
def test_a_recipe_makes_graphs_and_proves_them(name: str, tmp_path: Path) -> None:
    # The latency of a model this small is noise: it is left out.
    _, settings = standin(name, tmp_path)
    skipped = [
        "--set",
        "evidence.skip=[latency]",
        "--set",
        "release.accept={code: latency-missing, because: too small}",
    ]
    found = document("run", name, *settings, *skipped)
    assert {o["stage"]: o["verdict"] for o in found["outcomes"]} == dict.fromkeys(
        ["validate", "merge", "export", "evidence", "release", "push"], "pass"
    )
    assert list((tmp_path / "published/onnx").rglob("*.onnx"))
