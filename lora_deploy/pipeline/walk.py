"""One cell's way through its stages: each is begun, carried out, and told; the first error ends it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from lora_deploy.errors import InconclusiveError, LoraDeployError, RecipeError
from lora_deploy.evidence.verdict import Verdict
from lora_deploy.merge.progress import Progress
from lora_deploy.pipeline.cell import CellRun, Done
from lora_deploy.pipeline.journal import open_journal
from lora_deploy.pipeline.opening import OpenedRecipe
from lora_deploy.pipeline.outcomes import Outcome, Watcher
from lora_deploy.recipe.cells import Cell
from lora_deploy.recipe.stages import Stage


@dataclass(kw_only=True, eq=False)
class Walk:
    """A cell on its way; errors are outcomes."""

    opened: OpenedRecipe
    cell: Cell
    fresh: bool = False
    token: str | None = None
    progress: Progress | None = None
    watcher: Watcher | None = None
    outcomes: list[Outcome] = field(default_factory=list)
    """Of the stages so far."""

    @property
    def is_over(self) -> bool:
        """Whether a stage failed, so that none comes after it."""
        return any(outcome.error is not None for outcome in self.outcomes)

    @cached_property
    def run(self) -> CellRun:
        """The cell with its folder and journal.

        Raises:
            RecipeError: The folder cannot be made, or belongs to another recipe.
        """
        folder = self.cell.folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecipeError(f"{folder}: cannot be made: {error.strerror or error}") from error
        journal = open_journal(folder, self.opened.path, fresh=self.fresh)
        journal.write(folder)
        return CellRun(
            recipe=self.opened.recipe,
            recipe_folder=self.opened.folder,
            cell=self.cell,
            journal=journal,
            token=self.token,
            progress=self.progress,
        )

    def take(self, stages: Sequence[Stage]) -> None:
        """Carry out stages, up to the first that fails."""
        for stage in stages:
            if self.is_over:
                return
            self.begin(stage)
            started = time.monotonic()
            try:
                result: Done | LoraDeployError = self.run.run(stage)
            except LoraDeployError as error:
                result = error
            self.end(stage, result, time.monotonic() - started)

    def begin(self, stage: Stage) -> None:
        """Tell that a stage begins."""
        if self.watcher is not None:
            self.watcher.begin(self.cell.name, stage)

    def end(self, stage: Stage, result: Done | LoraDeployError, seconds: float) -> None:
        """Note and tell what a stage came to."""
        outcome = Outcome(
            cell=self.cell.name,
            stage=stage,
            verdict=_verdict(result),
            figure=result.figure if isinstance(result, Done) else result.message,
            seconds=seconds,
            was_done=isinstance(result, Done) and result.was_done,
            error=result if isinstance(result, LoraDeployError) else None,
        )
        self.outcomes.append(outcome)
        if self.watcher is not None:
            self.watcher.end(outcome)


def _verdict(result: Done | LoraDeployError) -> Verdict:
    if isinstance(result, Done):
        return result.verdict
    return Verdict.INCONCLUSIVE if isinstance(result, InconclusiveError) else Verdict.FAIL
