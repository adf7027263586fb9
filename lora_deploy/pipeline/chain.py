"""Run a recipe: every stage of every cell, one table of outcomes, one verdict.

Promise: a cell that fails does not stop the others; what failed stops its own cell, so nothing after it is made or
published; an interrupted run goes on where it was.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from lora_deploy.errors import LoraDeployError
from lora_deploy.merge.progress import Progress
from lora_deploy.pipeline.merging import execute_together
from lora_deploy.pipeline.opening import OpenedRecipe
from lora_deploy.pipeline.outcomes import Outcome, RunReport, Watcher, settled
from lora_deploy.pipeline.walk import Walk
from lora_deploy.recipe.cells import Cell
from lora_deploy.recipe.stages import Stage

_MOST_SIDE_BY_SIDE = 8
"""Merges under way at once: seven of eight reads of the base are spared, and no more files are open than need be."""


def run_recipe(
    opened: OpenedRecipe,
    stages: Sequence[Stage],
    *,
    fresh: bool = False,
    token: str | None = None,
    progress: Progress | None = None,
    watcher: Watcher | None = None,
) -> RunReport:
    """Carry out the stages of every cell; errors are outcomes.

    ``fresh`` makes evidence again though nothing changed, and takes folders over from other recipes.
    """
    outcomes: list[Outcome] = []
    for first in range(0, len(opened.cells), _MOST_SIDE_BY_SIDE):
        walks = [
            Walk(opened=opened, cell=cell, fresh=fresh, token=token, progress=progress, watcher=watcher)
            for cell in opened.cells[first : first + _MOST_SIDE_BY_SIDE]
        ]
        _carry_out(walks, stages, progress)
        outcomes += [outcome for walk in walks for outcome in walk.outcomes]
    return RunReport(recipe=opened.path, outcomes=settled(outcomes))


def run_cell(opened: OpenedRecipe, cell: Cell, stages: Sequence[Stage], *, fresh: bool = False) -> list[Outcome]:
    """Carry out the stages of one cell by itself, up to the first that fails."""
    walk = Walk(opened=opened, cell=cell, fresh=fresh)
    walk.take(stages)
    return walk.outcomes


def _carry_out(walks: Sequence[Walk], stages: Sequence[Stage], progress: Progress | None) -> None:
    at = stages.index(Stage.MERGE) if Stage.MERGE in stages and len(walks) > 1 else None
    if at is not None:
        for walk in walks:
            walk.take(stages[:at])
        _merge_side_by_side([walk for walk in walks if not walk.is_over], progress)
    for walk in walks:
        walk.take(stages[at + 1 :] if at is not None else stages)


def _merge_side_by_side(walks: Sequence[Walk], progress: Progress | None) -> None:
    """Merge the cells of each base together."""
    of_base: dict[Path, list[Walk]] = defaultdict(list)
    for walk in walks:
        try:
            of_base[walk.run.plan.binding.checkpoint.root.resolve()].append(walk)
        except LoraDeployError as error:
            walk.begin(Stage.MERGE)
            walk.end(Stage.MERGE, error, 0.0)
    for together in of_base.values():
        for walk in together:
            walk.begin(Stage.MERGE)
        ended = execute_together([(walk.run.plan, walk.cell.merged) for walk in together], progress=progress)
        for walk, one in zip(together, ended, strict=True):
            result = one.result if isinstance(one.result, LoraDeployError) else walk.run.after(one.result)
            walk.end(Stage.MERGE, result, one.seconds)
