"""What a run of a recipe would take: bytes, memory, disk, time. Nothing is written and no target is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lora_deploy.errors import LoraDeployError
from lora_deploy.export.plan import plan_export
from lora_deploy.export.sources import PlanSource
from lora_deploy.merge.budget import Estimate, estimate
from lora_deploy.merge.execute import is_done
from lora_deploy.merge.progress import Progress
from lora_deploy.pipeline import choices
from lora_deploy.pipeline.cell import CellRun
from lora_deploy.pipeline.journal import Journal
from lora_deploy.pipeline.merging import plan_binding
from lora_deploy.pipeline.opening import OpenedRecipe
from lora_deploy.recipe.cells import Cell
from lora_deploy.recipe.model import ExportChoice
from lora_deploy.recipe.stages import Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreseen:
    """What one cell would take."""

    cell: str
    n_tensors: int = 0
    """Tensors that are changed."""
    merge: Estimate | None = None
    is_merged: bool = False
    """Whether this merge is there already."""
    n_graph_bytes: int = 0
    """Weights of the graphs."""
    seconds: float = 0.0
    """Of the merge, by its estimate, and of measuring latency; making a graph, where it is not cached, comes on top."""
    targets: tuple[str, ...] = ()
    error: LoraDeployError | None = None


def foresee(opened: OpenedRecipe, stages: Sequence[Stage], progress: Progress | None = None) -> tuple[Foreseen, ...]:
    """Plan every cell; what cannot be planned is said for its cell."""
    found = []
    for cell in opened.cells:
        try:
            found.append(_foreseen(opened, cell, stages, progress))
        except LoraDeployError as error:
            found.append(Foreseen(cell=cell.name, error=error))
    return tuple(found)


def _foreseen(opened: OpenedRecipe, cell: Cell, stages: Sequence[Stage], progress: Progress | None) -> Foreseen:
    recipe = opened.recipe
    run = CellRun(recipe=recipe, recipe_folder=opened.folder, cell=cell, journal=Journal(recipe=str(opened.path)))
    expected = estimate(run.plan, cell.merged)
    graphs = sum(_graph_bytes(run, choice) for choice in recipe.export) if Stage.EXPORT in stages else 0
    measuring = recipe.evidence.seconds if recipe.evidence is not None and Stage.EVIDENCE in stages and graphs else 0.0
    return Foreseen(
        cell=cell.name,
        n_tensors=len(run.binding.updates),
        merge=expected,
        is_merged=is_done(run.plan, cell.merged, progress=progress),
        n_graph_bytes=graphs,
        seconds=expected.seconds + measuring,
        targets=cell.targets if Stage.PUSH in stages else (),
    )


def _graph_bytes(run: CellRun, choice: ExportChoice) -> int:
    """Size of the weights of a graph that will be made of the merged model."""
    options = choices.merge_options(run.recipe, run.cell)
    plan = plan_binding(
        run.binding,
        read_options=choices.read_options(run.cell),
        merge_options=replace(options, dtype=choice.dtype or options.dtype),
    )
    return plan_export(PlanSource(plan), choices.export_options(choice)).n_bytes
