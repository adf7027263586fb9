"""Replay a merged checkpoint, whoever wrote it: compute every tensor again and compare it with what is stored.

Promise (law 7): every tensor of the plan and of the folder gets one outcome, and nothing is compared on trust:
untouched tensors are compared with the base's bytes, adapted ones with the definition of the merge, evaluated by the
code that merges. Memory is bounded as the merge's is; the folder is only read.

Our own merges (``is_ours``) must match byte for byte, files and configuration included. Others round in other orders;
what they may differ by, and why that cannot hide a missing update, is said in ``orders``.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_deploy.bases import open_base
from lora_deploy.checkpoint import Checkpoint, has_weights, open_checkpoint
from lora_deploy.evidence.comparison import compare
from lora_deploy.evidence.configuration import check_config
from lora_deploy.evidence.judgement import judge, overall
from lora_deploy.evidence.outcome import Outcome, TensorOutcome
from lora_deploy.evidence.pairing import pair
from lora_deploy.evidence.verdict import Verdict
from lora_deploy.merge.plan import MergePlan
from lora_deploy.merge.progress import Progress

_TOLERANCE_OURS = "none: every byte of every weight file is the planned one"
_TOLERANCE = (
    "each tensor as one known order of rounding gives it, every element within that order's enclosure "
    "(float32 products of rank r within r + 4 units of float32)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayReport:
    """What a folder holds against what the plan demands."""

    verdict: Verdict
    outcomes: tuple[TensorOutcome, ...]
    """Of every tensor, in the plan's order; then what the plan does not have, then the configuration."""
    n_bytes: int
    """Stored bytes that were compared."""
    tolerance: str
    seconds: float
    is_ours: bool
    """Whether every byte had to match."""

    @property
    def faults(self) -> tuple[TensorOutcome, ...]:
        """What speaks against the folder, then what could not be checked."""
        harmless = {Outcome.EXACT, Outcome.IGNORED} if self.is_ours else {o for o in Outcome if o.is_sound}
        found = [entry for entry in self.outcomes if entry.outcome not in harmless]
        return tuple(sorted(found, key=lambda entry: entry.outcome is Outcome.INCONCLUSIVE))

    @property
    def reason(self) -> str:
        """Count what speaks against the folder."""
        counted = Counter(entry.outcome.value for entry in self.faults)
        return ", ".join(f"{n} {outcome}" for outcome, n in counted.items())

    @property
    def hint(self) -> str:
        """The tensors are named in the report; there is no more to advise."""
        return ""

    @property
    def counts(self) -> dict[Outcome, int]:
        """How often each outcome occurs."""
        found: dict[Outcome, int] = {}
        for entry in self.outcomes:
            found[entry.outcome] = found.get(entry.outcome, 0) + 1
        return found

    def to_json(self) -> dict[str, Any]:
        """The report for ``evidence.json``: counts of all outcomes, and each one that is not exact."""
        return {
            "verdict": self.verdict.value,
            "tolerance": self.tolerance,
            "n_bytes": self.n_bytes,
            "seconds": self.seconds,
            "counts": {outcome.value: count for outcome, count in self.counts.items()},
            "tensors": [entry.to_json() for entry in self.outcomes if entry.outcome is not Outcome.EXACT],
        }


def replay(plan: MergePlan, folder: Path, *, is_ours: bool = False, progress: Progress | None = None) -> ReplayReport:
    """Compare a merged checkpoint with the plan that should have made it.

    Raises:
        MalformedCheckpointError: The folder's files are truncated, or contradict each other.
        UnsafeFileError: They lead out of the folder.
        MemoryBudgetError: The plan's memory budget is too small.
    """
    started = time.monotonic()
    merged = open_merged(folder)
    pairing = pair(plan, merged)
    compare(plan, merged, pairing.comparisons, progress)
    outcomes = [judge(comparison, plan, merged, is_ours=is_ours) for comparison in pairing.comparisons]
    outcomes += pairing.outcomes
    outcomes += check_config(plan, merged, is_ours=is_ours)
    if is_ours:
        outcomes += _check_layout(plan, folder)
    return ReplayReport(
        verdict=overall(outcomes, pairing.comparisons, is_ours=is_ours),
        outcomes=tuple(outcomes),
        n_bytes=sum(comparison.stored.n_bytes for comparison in pairing.comparisons),
        tolerance=_TOLERANCE_OURS if is_ours else _TOLERANCE,
        seconds=time.monotonic() - started,
        is_ours=is_ours,
    )


def open_merged(folder: Path) -> Checkpoint:
    """Open safetensors as they are; pickled weights (``pytorch_model.bin``) as a base's are, converted once.

    Raises:
        InputError: The folder holds no weights, or they are damaged.
    """
    if has_weights(folder) or not folder.is_dir():
        return open_checkpoint(folder)
    return open_base(str(folder))


def _check_layout(plan: MergePlan, folder: Path) -> Iterator[TensorOutcome]:
    """Compare every weight file's header with the planned one: with the tensors' bytes, that is the whole file."""
    for shard in plan.shards:
        path = folder / shard.file
        if not path.is_file():
            yield TensorOutcome(name=shard.file, outcome=Outcome.WRONG_LAYOUT, message="no such file")
            continue
        with path.open("rb") as stream:
            found = stream.read(len(shard.header))
        if found != shard.header or path.stat().st_size != shard.n_bytes:
            message = f"header or size is not the planned one: {path.stat().st_size} bytes, expected {shard.n_bytes}"
            yield TensorOutcome(name=shard.file, outcome=Outcome.WRONG_LAYOUT, message=message)
