"""Recipes that come with the package: the folder ``recipes`` of the repository, package data in a wheel."""

from __future__ import annotations

from pathlib import Path

import lora_deploy
from lora_deploy.errors import RecipeError

_SUFFIX = ".yaml"


def library() -> dict[str, Path]:
    """Find the recipes by name."""
    package = Path(lora_deploy.__file__).parent
    folder = next((place for place in (package / "recipes", package.parent / "recipes") if place.is_dir()), package)
    return {path.stem: path for path in sorted(folder.glob(f"*{_SUFFIX}"))}


def find_recipe(name: str) -> tuple[Path, Path]:
    """Find a recipe file, or one of the library by its name; and the folder that its paths are relative to.

    Raises:
        RecipeError: There is none.
    """
    path = Path(name)
    if path.is_file():
        return path, path.parent
    known = library()
    if name in known:
        return known[name], Path()
    raise RecipeError(
        f"{name}: no such file, and no recipe of this name comes with the package",
        hint="lora-deploy recipe list, or lora-deploy recipe init ADAPTER > recipe.yaml",
        code="no-recipe",
    )
