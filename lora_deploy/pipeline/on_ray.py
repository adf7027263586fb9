"""Merges and recipes on a Ray cluster: the same functions as here, a shard or a cell a task; extra ``ray``.

Tasks read inputs from, and write outputs to, file systems that all nodes share; no tensor passes through Ray. A task
whose node dies runs again elsewhere: shards and records come by rename, cells go on where they were.

Promise: the same bytes as without Ray. A token is never an argument of a task: nodes have their own, or a login.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from lora_deploy.adapters.interface import ReadOptions
from lora_deploy.errors import LoraDeployError, MergeError, RecipeError
from lora_deploy.merge.execute import Merged
from lora_deploy.merge.options import MergeOptions
from lora_deploy.merge.progress import Progress, reporting
from lora_deploy.merge.tasks import Task
from lora_deploy.pipeline.chain import run_cell
from lora_deploy.pipeline.merging import carry_out_task, default_output, finalize, plan
from lora_deploy.pipeline.opening import OpenedRecipe
from lora_deploy.pipeline.outcomes import Outcome, RunReport, Watcher, settled
from lora_deploy.recipe.cells import Cell
from lora_deploy.recipe.stages import Stage
from lora_deploy.validate import BindOptions

T = TypeVar("T")

N_RETRIES = 3
"""How often a task is begun again after its node or process died."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeRequest:
    """A merge by what the user said, for a process that knows nothing else."""

    adapters: tuple[str, ...]
    base: str | None
    output: str | None
    read_options: ReadOptions
    bind_options: BindOptions
    merge_options: MergeOptions
    dequantize: bool = False


def merge_on_ray(request: MergeRequest, *, progress: Progress | None = None) -> Merged:
    """Carry out a merge, one shard a task, and put it in place from here.

    Raises:
        RecipeError: Ray is not installed, or its cluster cannot be reached.
        MergeError: A task was lost more often than it is begun again.
        LoraDeployError: As ``plan`` and ``execute``.
    """
    request = _everywhere(request)
    planned = _plan(request)
    output = Path(request.output) if request.output is not None else default_output(planned).absolute()
    request = replace(request, output=str(output))
    n_cpus = request.merge_options.n_workers or 1
    request = replace(request, merge_options=replace(request.merge_options, n_workers=n_cpus))
    n_shards = len(planned.shards)
    with _cluster() as ray, reporting(progress, "merging", n_shards, "weight files") as advance:
        task = ray.remote(num_cpus=n_cpus, max_retries=N_RETRIES)(_carry_out_share)
        waiting = {task.remote(request, k, n_shards): k for k in range(n_shards)}
        for _ in _finished(ray, waiting):
            advance(1)
    return finalize(planned, output, progress=progress)


def run_recipe_on_ray(
    opened: OpenedRecipe, stages: Sequence[Stage], *, fresh: bool = False, watcher: Watcher | None = None
) -> RunReport:
    """Carry out the stages of every cell, one cell a task; outcomes in the order of the recipe.

    Raises:
        RecipeError: Ray is not installed, or its cluster cannot be reached.
    """
    with _cluster() as ray:
        task = ray.remote(num_cpus=1, max_retries=N_RETRIES)(_run_cell)
        waiting = {task.remote(opened, cell, tuple(stages), fresh): k for k, cell in enumerate(opened.cells)}
        found: dict[int, list[Outcome]] = {}
        for k, outcomes in _finished(ray, waiting):
            found[k] = outcomes
            for outcome in outcomes if watcher is not None else ():
                watcher.end(outcome)  # type: ignore[union-attr] # asked above
    return RunReport(recipe=opened.path, outcomes=settled([o for k in sorted(found) for o in found[k]]))


def _plan(request: MergeRequest) -> Any:  # noqa: ANN401 - a plan
    return plan(
        request.adapters,
        base=request.base,
        read_options=request.read_options,
        bind_options=request.bind_options,
        merge_options=request.merge_options,
        dequantize=request.dequantize,
    )


def _carry_out_share(request: MergeRequest, index: int, count: int) -> int:
    """The task: plan again, write one share; the same as ``merge --task-index`` does."""
    assert request.output is not None  # noqa: S101 - the driver chose it
    done = carry_out_task(_plan(request), Path(request.output), Task(index=index, count=count))
    return done.n_bytes


def _run_cell(opened: OpenedRecipe, cell: Cell, stages: tuple[Stage, ...], fresh: bool) -> list[Outcome]:  # noqa: FBT001 - of a task
    return run_cell(opened, cell, stages, fresh=fresh)


def _everywhere(request: MergeRequest) -> MergeRequest:
    """Make local paths absolute: tasks run in other folders."""

    def absolute(reference: str) -> str:
        path = Path(reference).expanduser()
        return str(path.absolute()) if path.exists() else reference

    return replace(
        request,
        adapters=tuple(map(absolute, request.adapters)),
        base=absolute(request.base) if request.base is not None else None,
        output=str(Path(request.output).absolute()) if request.output is not None else None,
    )


@contextmanager
def _cluster() -> Iterator[Any]:
    """Join the cluster of ``RAY_ADDRESS``, or start one on this machine."""
    try:
        import ray
    except ImportError as error:
        raise RecipeError(
            f"--executor ray: ray cannot be imported: {error}",
            hint="pip install 'lora-deploy[ray]'",
            code="extra-missing",
        ) from error
    if ray.is_initialized():
        yield ray
        return
    address = os.environ.get("RAY_ADDRESS") or "local"
    # One that is started here is for this machine alone: it listens to nobody else.
    own: dict[str, Any] = {"_node_ip_address": "127.0.0.1", "include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise RecipeError(
            f"--executor ray: {str(error).splitlines()[0]}",
            hint="set RAY_ADDRESS to the cluster's address, or unset it to start one here",
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _finished(ray: Any, waiting: dict[Any, T]) -> Iterator[tuple[T, Any]]:  # noqa: ANN401 - Ray has no types
    """Yield what tasks give, as they end; cancel the rest where one fails.

    Raises:
        MergeError: A task was lost, with its node, more often than it is begun again.
        LoraDeployError: A task's own.
    """
    left = dict(waiting)
    try:
        while left:
            (ready, *_), _ = ray.wait([*left], num_returns=1)
            yield left.pop(ready), ray.get(ready)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, LoraDeployError):
            raise error.cause from error
        raise
    except ray.exceptions.RayError as error:
        raise MergeError(
            f"a task was lost {N_RETRIES + 1} times: {str(error).splitlines()[0]}",
            hint="the same command goes on with what is there",
            code="task-lost",
        ) from error
    finally:
        for task in left:
            ray.cancel(task, force=True)
