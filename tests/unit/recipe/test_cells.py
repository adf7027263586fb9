"""The matrix: a cell for each adapter and dtype, none sharing a folder or a target."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_deploy.errors import RecipeError
from lora_deploy.recipe.cells import cells_of, reference
from lora_deploy.recipe.model import Recipe


def recipe(**fields: object) -> Recipe:
    return Recipe.model_validate({"adapters": ["runs/7"], **fields})


def test_one_adapter_in_one_dtype_is_one_cell_of_its_name(tmp_path: Path) -> None:
    (cell,) = cells_of(recipe(), tmp_path)
    assert cell.name == "7"
    assert cell.merged == tmp_path / "dist/7/merged"


def test_every_adapter_meets_every_dtype(tmp_path: Path) -> None:
    cells = cells_of(recipe(adapters=["a", {"path": ["b", "o/c@v1"]}], dtypes=["float16", "base"]), tmp_path)
    assert [cell.name for cell in cells] == ["a-float16", "a-base", "b+c-float16", "b+c-base"]
    assert len({cell.folder for cell in cells}) == 4


def test_targets_are_filled_in(tmp_path: Path) -> None:
    told = recipe(adapters=["a", "b"], targets=["me/{adapter}-{dtype}", "./out/{cell}"])
    first, second = cells_of(told, tmp_path)
    assert first.targets == ("me/a-float16", str(tmp_path / "out/a"))
    assert second.targets == ("me/b-float16", str(tmp_path / "out/b"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"adapters": ["x/a", "y/a"]}, "two cells have the name 'a'"),
        ({"adapters": ["a", "b"], "targets": ["me/model"]}, "two cells have the target 'me/model'"),
        ({"targets": ["me/{what}"]}, "placeholder"),
        ({"targets": ["me/{0}"]}, "placeholder"),
        ({"targets": ["me/{"]}, "placeholder"),
    ],
)
def test_cells_that_would_meet_are_refused(fields: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        cells_of(recipe(**fields), tmp_path)


def test_a_file_gives_its_own_name_or_its_folders(tmp_path: Path) -> None:
    for name in ("style.v2.safetensors", "run/adapter_model.safetensors"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    told = recipe(adapters=[str(tmp_path / "style.v2.safetensors"), str(tmp_path / "run/adapter_model.safetensors")])
    assert [cell.name for cell in cells_of(told, tmp_path)] == ["style.v2", "run"]


def test_a_path_beside_the_recipe_wins_over_a_hub_id(tmp_path: Path) -> None:
    assert reference("runs/7", tmp_path) == "runs/7"
    (tmp_path / "runs/7").mkdir(parents=True)
    assert reference("runs/7", tmp_path) == str(tmp_path / "runs/7")
    assert reference("./gone", tmp_path) == str(tmp_path / "gone")
