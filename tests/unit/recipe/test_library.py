"""The recipes that come with the package: each one is complete, and says only what a recipe may say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lora_deploy.errors import RecipeError
from lora_deploy.evidence.verdict import Check
from lora_deploy.recipe.cells import cells_of
from lora_deploy.recipe.library import find_recipe, library
from lora_deploy.recipe.model import Recipe
from lora_deploy.recipe.read import read_recipe

ARCHITECTURES = {
    *("llama-3-8b", "mistral-7b", "mixtral-8x7b", "qwen3", "gemma", "phi", "gpt-2", "bloom", "smollm2"),
    *("t5", "whisper", "clip", "vit", "llava", "idefics", "stable-diffusion-1.5", "sdxl", "flux"),
}


def recipe_of(name: str) -> Recipe:
    return read_recipe(library()[name], environment={})


def test_every_common_architecture_has_a_recipe() -> None:
    assert set(library()) == ARCHITECTURES


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_a_recipe_is_one_cell_from_a_placeholder_to_a_release(name: str) -> None:
    recipe = recipe_of(name)
    assert len(recipe.summary) in range(10, 80)
    assert recipe.base is not None
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", recipe.base.path), "a hub id"
    (cell,) = cells_of(recipe, Path())
    assert cell.name == "my-adapter"
    assert cell.adapter.path[0].startswith("runs/my-adapter")
    assert "release" in recipe.stages
    assert not recipe.targets, "nobody pushes by mistake"


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_a_recipe_explains_its_dtype(name: str) -> None:
    lines = library()[name].read_text().splitlines()
    place = next(number for number, line in enumerate(lines) if line.startswith("dtypes:"))
    assert lines[place - 1].startswith("# ")


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_no_graph_computes_in_what_the_cpu_provider_cannot_run(name: str) -> None:
    recipe = recipe_of(name)
    for choice in recipe.export:
        assert (choice.dtype or recipe.dtypes[0]) != "bfloat16"


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_what_a_recipe_leaves_out_is_what_it_accepts(name: str) -> None:
    recipe = recipe_of(name)
    assert recipe.evidence is not None
    assert recipe.release is not None
    needed = {Check.REPLAY, Check.PARITY, *([Check.LATENCY] if recipe.export else [])}
    made = set(recipe.evidence.only or Check) - set(recipe.evidence.skip)
    assert {gap.code for gap in recipe.release.accept} == {f"{check}-missing" for check in needed - made}


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_graphs_are_not_proven_layer_by_layer_which_leaves_them_nothing_to_be_compared_with(name: str) -> None:
    recipe = recipe_of(name)
    assert recipe.evidence is not None
    assert not (recipe.export and recipe.evidence.layerwise)


def test_a_recipe_is_found_by_its_name_and_its_paths_are_relative_to_where_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe("vit") == (library()["vit"], Path())
    Path("vit").write_text("adapters: mine")
    assert find_recipe("vit")[0] == Path("vit"), "a file wins"


def test_an_unknown_name_says_what_to_do() -> None:
    with pytest.raises(RecipeError, match="no recipe of this name") as caught:
        find_recipe("llama-99")
    assert "recipe list" in str(caught.value.hint)
