"""The matrix of a recipe: a cell for each adapter and dtype, each with a folder and targets of its own.

Promise: no two cells share a folder or a target.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from lora_deploy.errors import RecipeError
from lora_deploy.recipe.model import AdapterChoice, Recipe

_LOCAL = ("./", "../", "~/")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One adapter (or several merged together) in one dtype."""

    name: str
    adapter: AdapterChoice
    dtype: str
    folder: Path
    """Holds ``merged`` and ``release``."""
    targets: tuple[str, ...]

    @property
    def merged(self) -> Path:
        """Folder of the merged checkpoint, graphs inside."""
        return self.folder / "merged"

    @property
    def release(self) -> Path:
        """Folder of the release, which is called like the cell: cards and manifests take their name from it."""
        return self.folder / "release" / self.name


def cells_of(recipe: Recipe, folder: Path) -> tuple[Cell, ...]:
    """Lay out the matrix of a recipe that lies in ``folder``.

    Raises:
        RecipeError: Two cells have one name or one target, or a target has an unknown placeholder.
    """
    cells = []
    output = located(recipe.output, folder)
    for adapter in recipe.adapters:
        own = adapter.name or "+".join(_name_of(path) for path in adapter.path)
        for dtype in recipe.dtypes:
            name = f"{own}-{dtype}" if len(recipe.dtypes) > 1 else own
            targets = tuple(_filled(target, own, dtype, name, folder) for target in recipe.targets)
            cells.append(Cell(name=name, adapter=adapter, dtype=dtype, folder=output / name, targets=targets))
    _refuse_twice("adapters", [cell.name for cell in cells], "name", "give each a name: of its own")
    where = [target for cell in cells for target in cell.targets]
    _refuse_twice("targets", where, "target", "use {adapter}, {dtype} or {cell} in it")
    return tuple(cells)


def located(path: str, folder: Path) -> Path:
    """Give a path that is relative to the recipe's folder."""
    return folder / Path(path).expanduser()


def reference(text: str, folder: Path) -> str:
    """Resolve what names a path or a hub id: a path beside the recipe wins, as everywhere."""
    path = located(text, folder)
    return str(path) if path.exists() or text.startswith((*_LOCAL, "/")) else text


def _name_of(path: str) -> str:
    plain = path.rstrip("/").rpartition("@")[0] if "@" in Path(path).name else path.rstrip("/")
    named = Path(plain)
    is_common = named.name.startswith(("adapter_model.", "pytorch_lora_weights."))
    return named.parent.name if is_common else named.name.removesuffix(named.suffix if named.is_file() else "")


def _filled(target: str, adapter: str, dtype: str, cell: str, folder: Path) -> str:
    try:
        filled = target.format_map({"adapter": adapter, "dtype": dtype, "cell": cell})
    except (KeyError, IndexError, ValueError) as error:
        raise RecipeError(
            f"targets: {target!r}: found placeholder {error}", hint="{adapter}, {dtype} and {cell} are known"
        ) from error
    return str(located(filled, folder).resolve()) if filled.startswith(_LOCAL) else filled


def _refuse_twice(key: str, names: list[str], what: str, hint: str) -> None:
    twice = [name for name, n in Counter(names).items() if n > 1]
    if twice:
        raise RecipeError(f"{key}: two cells have the {what} {twice[0]!r}", hint=hint)
