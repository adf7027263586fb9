"""Carry out several merges of one base side by side: the first shard of each, then the second of each, and so on.

What one merge has read of the base is still in the system's file cache when the next one asks for it, so that the base
is read from disk once where a shard fits there, however large the whole is. No merge holds more than it would alone.

Promise: each merge is byte for byte what it is alone, and one that fails does not stop the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from lora_deploy.errors import LoraDeployError, MemoryBudgetError
from lora_deploy.merge.execute import Merged, Work, begun
from lora_deploy.merge.form import Form
from lora_deploy.merge.plan import MergePlan, ShardPlan
from lora_deploy.merge.progress import Progress
from lora_deploy.safetensors_file import writing_error


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Wanted:
    """One of the merges."""

    plan: MergePlan
    out: Path
    form: Form | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ended:
    """What became of one of them."""

    result: Merged | LoraDeployError
    seconds: float = 0.0
    """Spent on its own weights."""


def execute_together(wanted: Sequence[Wanted], *, progress: Progress | None = None) -> tuple[Ended, ...]:
    """Carry out merges of one base, in lockstep through it; errors are results, in the order of what was wanted.

    What does not fit the memory budget beside the others is carried out after them.
    """
    ended: dict[int, Ended] = {}
    later: list[int] = []
    with ExitStack() as folders:
        works: dict[int, Work] = {}
        for k, one in enumerate(wanted):
            try:
                work = folders.enter_context(begun(one.plan, one.out, form=one.form, progress=progress))
            except LoraDeployError as error:
                if isinstance(error, MemoryBudgetError) and works:
                    later.append(k)
                else:
                    ended[k] = Ended(result=error)
            else:
                if isinstance(work, Merged):
                    ended[k] = Ended(result=work)
                else:
                    works[k] = work
        for k, shard in _steps(works):
            if k not in ended:
                result = _take(works[k], shard, progress)
                if result is not None:
                    ended[k] = Ended(result=result, seconds=works[k].seconds)
    if later:
        ended |= zip(later, execute_together([wanted[k] for k in later], progress=progress), strict=True)
    return tuple(ended[k] for k in range(len(wanted)))


def _steps(works: Mapping[int, Work]) -> list[tuple[int, ShardPlan | None]]:
    """Order all shards by where they begin in their model: in another dtype the same tensors fill more of them.

    None, after a merge's last shard, is its end.
    """
    steps: list[tuple[float, int, ShardPlan | None]] = []
    for k, work in works.items():
        begin = 0
        for shard in work.plan.shards:
            steps.append((begin / work.plan.n_bytes, k, shard))
            begin += shard.n_bytes
        steps.append((1.0, k, None))
    return [(k, shard) for _, k, shard in sorted(steps, key=lambda step: step[:2])]


def _take(work: Work, shard: ShardPlan | None, progress: Progress | None) -> Merged | LoraDeployError | None:
    """Take one step of a merge: what became of it, where that ended it."""
    try:
        if shard is None:
            return work.put_in_place()
        work.write([shard], progress)
    except LoraDeployError as error:
        return error
    except OSError as error:
        return writing_error(work.partial, error)
    return None
