"""``lora-deploy run``: a recipe in, every stage of every cell done, one table and one verdict out."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora_deploy.cli.junit import write_junit
from lora_deploy.cli.numbers import format_seconds, format_size
from lora_deploy.cli.options import output_options
from lora_deploy.cli.run_panel import RunLog, RunPanel
from lora_deploy.cli.run_tables import show_run, step_summary
from lora_deploy.cli.screen import Screen
from lora_deploy.cli.tasks import executor_option
from lora_deploy.recipe.stages import Stage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_deploy.pipeline.foresight import Foreseen

_stages = click.Choice([stage.value for stage in Stage])


@click.command(short_help="Run a recipe: everything from adapter to target, with one verdict.")
@click.argument("recipe", metavar="RECIPE")
@click.option("--from", "first", type=_stages, help="Begin with this stage; what is before it must be there.")
@click.option("--until", "last", type=_stages, help="End with this stage.")
@click.option("--only", type=_stages, help="Make this stage alone.")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Say something in place of the recipe, such as --set merge.memory=4GB. Repeatable.",
)
@click.option("--fresh", is_flag=True, help="Prove again what was proven, and take folders over from other recipes.")
@click.option("--dry-run", is_flag=True, help="Plan only, write nothing: bytes, memory, disk and time of every cell.")
@executor_option("one cell a task")
@click.option("--token", metavar="TOKEN", help="Token of the hub. Better: HF_TOKEN in the environment, or a login.")
@click.option("--junit", type=click.Path(path_type=Path), metavar="FILE", help="Write the outcomes as JUnit XML, too.")
@output_options
@click.pass_obj
def run(
    screen: Screen,
    /,
    recipe: str,
    overrides: tuple[str, ...],
    dry_run: bool,
    junit: Path | None,
    token: str | None,
    fresh: bool,
    executor: str,
    **limits: str | None,
) -> None:
    """Run RECIPE, a file or the name of one that comes along: validate, merge, export, prove, release and push every
    adapter with every dtype that it names.

    What is finished and unchanged is not done again; an interrupted run goes on where it was. A cell that fails does
    not stop the others. The exit status is that of the first failure; 10 where something could not be checked.

    \b
    Examples:
      lora-deploy recipe init runs/7 > recipe.yaml
      lora-deploy run recipe.yaml --dry-run
      lora-deploy run recipe.yaml --until release
      lora-deploy run recipe.yaml --set dtypes=bfloat16 --junit report.xml
    """  # noqa: D205, D301 - \b is click's mark for text that keeps its lines
    from lora_deploy import pipeline

    opened = pipeline.open_recipe(recipe, overrides)
    bounds = {name: Stage(stage) for name, stage in limits.items() if stage}
    stages = pipeline.chosen_stages(opened.recipe, **bounds)
    if dry_run:
        _show_foreseen(screen, pipeline.foresee(opened, stages, screen.progress()))
        return
    screen.resumes = "; the same command goes on where it was"
    if executor == "ray" and token is not None:
        raise click.UsageError("--token is no argument of tasks: give every node its HF_TOKEN, or log in there")
    panel = None if screen.is_quiet else RunPanel.if_terminal([cell.name for cell in opened.cells], stages) or RunLog()
    with panel or nullcontext():
        if executor == "ray":
            report = pipeline.run_recipe_on_ray(opened, stages, fresh=fresh, watcher=panel)
        else:
            report = pipeline.run_recipe(opened, stages, fresh=fresh, token=token, progress=panel, watcher=panel)
    show_run(screen, report)
    step_summary(report)
    if junit is not None:
        write_junit(report, junit)
    screen.exit_code = report.exit_code


def _show_foreseen(screen: Screen, cells: Sequence[Foreseen]) -> None:
    screen.publish({"dry_run": True, "cells": [_document(cell) for cell in cells]})
    rows = []
    for cell in cells:
        if cell.merge is None:
            continue
        estimate = cell.merge
        rows.append(
            (
                cell.cell,
                f"{cell.n_tensors}",
                "there already" if cell.is_merged else format_size(estimate.n_output_bytes),
                format_size(cell.n_graph_bytes) if cell.n_graph_bytes else "–",
                format_size(estimate.peak_bytes),
                format_seconds(cell.seconds),
                ", ".join(cell.targets) or "–",
            )
        )
    screen.table(("cell", "tensors", "weights", "graphs", "memory", "time, about", "targets"), rows)
    merges = [cell for cell in cells if cell.merge is not None]
    needed = sum(c.n_graph_bytes + (0 if c.is_merged or c.merge is None else c.merge.n_output_bytes) for c in merges)
    if merges and merges[0].merge is not None:
        free = merges[0].merge.free_disk_bytes
        screen.line(f"disk: {format_size(needed)} needed at most, {format_size(free)} free")
    for cell in cells:
        if cell.error is not None:
            screen.line(f"{cell.cell}: {cell.error.message}")
    first = next((cell.error for cell in cells if cell.error is not None), None)
    if first is not None:
        raise first


def _document(cell: Foreseen) -> dict[str, object]:
    return {
        "cell": cell.cell,
        "n_tensors": cell.n_tensors,
        "merge": cell.merge,
        "is_merged": cell.is_merged,
        "n_graph_bytes": cell.n_graph_bytes,
        "seconds": cell.seconds,
        "targets": cell.targets,
        "error": cell.error.message if cell.error is not None else None,
    }
