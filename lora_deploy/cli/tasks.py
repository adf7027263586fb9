"""Which share of a merge a command is to do: of an array of jobs on Slurm or Kubernetes, or as the user says."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import click

if TYPE_CHECKING:
    from lora_deploy.merge.tasks import Task

F = TypeVar("F", bound=Callable[..., object])

_KUBERNETES = "JOB_COMPLETION_INDEX"
_SLURM, _SLURM_FIRST, _SLURM_STEP = "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_STEP"
_SLURM_COUNT = "SLURM_ARRAY_TASK_COUNT"


def task_options(command: F) -> F:
    """Add the options of a merge that many machines share."""
    options = (
        click.option(
            "--task-index",
            type=int,
            metavar="I",
            help="Write share I of --task-count, from 0, and leave the rest to others. Where only the count is given: "
            f"{_KUBERNETES}, or {_SLURM} counted from {_SLURM_FIRST}.",
        ),
        click.option(
            "--task-count",
            type=click.IntRange(1),
            metavar="N",
            help=f"How many tasks share the weight files. Where only the index is given: {_SLURM_COUNT}.",
        ),
        click.option("--finalize", is_flag=True, help="Check what all tasks wrote, and put the merge in place."),
        executor_option("one weight file a task"),
    )
    for option in reversed(options):
        command = option(command)
    return command


def executor_option(unit: str) -> Callable[[F], F]:
    """Make the option that chooses where tasks run; ``unit`` says what one is."""
    return click.option(
        "--executor",
        type=click.Choice(["local", "ray"]),
        default="local",
        show_default=True,
        help=f"ray: {unit}, on the cluster of RAY_ADDRESS or one that is started here; all nodes share the files.",
    )


def share_of(index: int | None, count: int | None, *, finalize: bool) -> Task | None:
    """Give the share that options and environment ask for; None without either option.

    Raises:
        click.UsageError: One of the two is nowhere, or ``--finalize`` stands beside them.
        RecipeError: The index is none of the count.
    """
    if index is None and count is None:
        return None
    if finalize:
        raise click.UsageError("--finalize checks what all tasks wrote: leave --task-index and --task-count out")
    index = _index_in_environment() if index is None else index
    count = _number(_SLURM_COUNT) if count is None else count
    if index is None or count is None:
        option = "--task-index" if index is None else "--task-count"
        raise click.UsageError(f"{option}: not given, and this is no job of an array that says it")
    from lora_deploy.merge.tasks import Task

    return Task(index=index, count=count)


def _index_in_environment() -> int | None:
    index = _number(_KUBERNETES)
    if index is not None:
        return index
    identifier = _number(_SLURM)
    if identifier is None:
        return None
    return (identifier - (_number(_SLURM_FIRST) or 0)) // (_number(_SLURM_STEP) or 1)


def _number(variable: str) -> int | None:
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else None
