"""What stages came to, who is told of it, and the one verdict on all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from lora_deploy.errors import InconclusiveError, LoraDeployError
from lora_deploy.evidence.verdict import Verdict
from lora_deploy.recipe.stages import Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one stage of one cell came to."""

    cell: str
    stage: Stage
    verdict: Verdict
    figure: str
    """What a person looks for; the error's message where there is one."""
    seconds: float
    was_done: bool = False
    error: LoraDeployError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """What a run came to."""

    recipe: Path
    outcomes: tuple[Outcome, ...]

    @property
    def verdict(self) -> Verdict:
        """Sum up: what failed before what could not be checked."""
        found = {outcome.verdict for outcome in self.outcomes}
        return next((v for v in (Verdict.FAIL, Verdict.INCONCLUSIVE) if v in found), Verdict.PASS)

    @property
    def cause(self) -> Outcome | None:
        """The first outcome that decides the verdict; None where everything passed."""
        return next((o for o in self.outcomes if o.verdict is self.verdict is not Verdict.PASS), None)

    @property
    def exit_code(self) -> int:
        """As documented for the stage that failed."""
        cause = self.cause
        if cause is None:
            return 0
        return cause.error.exit_code if cause.error is not None else InconclusiveError.exit_code


class Watcher(Protocol):
    """Told of every stage."""

    def begin(self, cell: str, stage: Stage) -> None:
        """A stage begins."""
        ...

    def end(self, outcome: Outcome) -> None:
        """A stage has ended."""
        ...


def settled(outcomes: Sequence[Outcome]) -> tuple[Outcome, ...]:
    """Let inconclusive evidence pass where the release after it was made: somebody accepted the gap, on record."""
    released = {o.cell for o in outcomes if o.stage is Stage.RELEASE and o.verdict is Verdict.PASS}
    return tuple(
        replace(outcome, verdict=Verdict.PASS, figure=f"{outcome.figure} (accepted)")
        if outcome.stage is Stage.EVIDENCE and outcome.verdict is Verdict.INCONCLUSIVE and outcome.cell in released
        else outcome
        for outcome in outcomes
    )
