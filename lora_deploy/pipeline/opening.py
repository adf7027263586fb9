"""Open a recipe: where it lies, its cells, and the stages that a run of it makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_deploy.errors import RecipeError
from lora_deploy.recipe.cells import Cell, cells_of
from lora_deploy.recipe.library import find_recipe
from lora_deploy.recipe.model import Recipe
from lora_deploy.recipe.read import read_recipe
from lora_deploy.recipe.stages import Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedRecipe:
    """A recipe, where it lies, and its cells."""

    path: Path
    folder: Path
    """What its paths are relative to."""
    recipe: Recipe
    cells: tuple[Cell, ...]


def open_recipe(name: str, overrides: Sequence[str] = ()) -> OpenedRecipe:
    """Read a recipe, a file or one that comes with the package, and lay out its cells.

    Raises:
        RecipeError: It says what no recipe can say.
    """
    path, folder = find_recipe(name)
    recipe = read_recipe(path, overrides)
    return OpenedRecipe(path=path, folder=folder, recipe=recipe, cells=cells_of(recipe, folder))


def chosen_stages(
    recipe: Recipe, *, first: Stage | None = None, last: Stage | None = None, only: Stage | None = None
) -> tuple[Stage, ...]:
    """Give the stages that a run makes.

    Raises:
        RecipeError: None is left, or the options contradict each other.
    """
    if only is not None and (first is not None or last is not None):
        raise RecipeError("--only with --from or --until", hint="give one or the other")
    order = list(Stage)
    begin, end = order.index(first or only or order[0]), order.index(last or only or order[-1])
    stages = tuple(stage for stage in recipe.stages if begin <= order.index(stage) <= end)
    if not stages:
        asked = only or f"{order[begin]} … {order[end]}"
        raise RecipeError(f"nothing to do: the recipe has no stage {asked}", hint=f"it has {', '.join(recipe.stages)}")
    return stages
