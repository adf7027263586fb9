"""What ``lora-deploy run`` shows at its end: a short table, the verdict, and the same for a CI job's page."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from lora_deploy.cli.numbers import format_seconds
from lora_deploy.cli.screen import Screen, document_of

if TYPE_CHECKING:
    from lora_deploy.pipeline.outcomes import Outcome, RunReport

_MOST = 100
"""Characters of a figure that a table shows."""


def show_run(screen: Screen, report: RunReport) -> None:
    """Print the outcomes, and PASS, FAIL or INCONCLUSIVE with its first cause."""
    screen.publish(
        {
            "recipe": report.recipe,
            "verdict": report.verdict,
            "exit_code": report.exit_code,
            "cause": _cause(report) or None,
            "outcomes": [_document(outcome) for outcome in report.outcomes],
        }
    )
    names, verdicts = _names(report), [_verdict(outcome) for outcome in report.outcomes]
    wide, broad = max(map(len, names), default=0), max(map(len, verdicts), default=0)
    for name, verdict, outcome in zip(names, verdicts, report.outcomes, strict=True):
        time = format_seconds(outcome.seconds)
        screen.line(f"{name:{wide}}  {verdict:{broad}}  {time:>11}  {_short(outcome.figure)}")
    screen.line(f"{report.verdict.value.upper()}{_cause(report)}")
    error = report.cause.error if report.cause is not None else None
    if error is not None and error.hint:
        screen.line(f"hint: {error.hint}")


def step_summary(report: RunReport) -> None:
    """Append the table to the page of a GitHub job, if this is one."""
    place = os.environ.get("GITHUB_STEP_SUMMARY")
    if not place:
        return
    rows = [
        f"| {_cell(outcome.cell)} | {outcome.stage} | {_verdict(outcome)} | {_cell(_short(outcome.figure))} "
        f"| {format_seconds(outcome.seconds)} |"
        for outcome in report.outcomes
    ]
    heading = f"### lora-deploy: {report.verdict.value.upper()}{_cell(_cause(report))}"
    table = [heading, "", "| cell | stage | verdict | figure | time |", "|---|---|---|---|---|", *rows, ""]
    with Path(place).open("a", encoding="utf-8") as stream:
        stream.write("\n".join(table) + "\n")


def _names(report: RunReport) -> list[str]:
    has_several = len({outcome.cell for outcome in report.outcomes}) > 1
    return [f"{o.cell} {o.stage}" if has_several else o.stage.value for o in report.outcomes]


def _verdict(outcome: Outcome) -> str:
    return f"{outcome.verdict}, unchanged" if outcome.was_done else outcome.verdict.value


def _cause(report: RunReport) -> str:
    cause = report.cause
    return "" if cause is None else f": {cause.cell}, {cause.stage}: {_one_line(cause.figure)}"


def _short(figure: str) -> str:
    line = _one_line(figure)
    return line if len(line) <= _MOST else line[: _MOST - 1] + "…"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _document(outcome: Outcome) -> dict[str, object]:
    error = outcome.error
    return {
        "cell": outcome.cell,
        "stage": outcome.stage,
        "verdict": outcome.verdict,
        "figure": outcome.figure,
        "seconds": outcome.seconds,
        "was_done": outcome.was_done,
        "error": document_of(error) if error is not None else None,
    }
