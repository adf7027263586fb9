"""Replay a direct export: what its graphs read is what base and adapters make, computed again, byte for byte.

There is no merged checkpoint to compare; the binding table says which tensor every initializer is made of.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from lora_deploy.checkpoint import read_json
from lora_deploy.errors import ExportError, InputError
from lora_deploy.evidence.outcome import Outcome, TensorOutcome
from lora_deploy.evidence.replay import ReplayReport
from lora_deploy.evidence.verdict import Verdict
from lora_deploy.export.binding_table import BindingTable, taken_tensors
from lora_deploy.export.components import graphs_of
from lora_deploy.export.execute import exported_config
from lora_deploy.export.graphs import TABLE_NAME
from lora_deploy.export.record import RECORD_NAME, ExportRecord
from lora_deploy.export.replay import replay_export
from lora_deploy.export.sources import PlanSource
from lora_deploy.merge.plan import MergePlan
from lora_deploy.merge.progress import Progress
from lora_deploy.pipeline_layout import CONFIG_NAME

_TOLERANCE = "none: every byte that the graphs read is the planned one"


def replay_direct(
    plan: MergePlan, folder: Path, record: ExportRecord, *, is_ours: bool, progress: Progress | None = None
) -> ReplayReport:
    """Compare what a direct export's graphs read with its plan.

    Without ``is_ours`` other bytes may be right, too (kinds that are defined per torch build and instruction set, on
    another machine): a difference is then inconclusive.

    Raises:
        MemoryBudgetError: The plan's memory budget is too small.
        MergeError: A value cannot be merged.
    """
    started = time.monotonic()
    kind = Outcome.WRONG_GRAPH if is_ours else Outcome.INCONCLUSIVE
    faults = [TensorOutcome(name=RECORD_NAME, outcome=kind, message=text) for text in _faults(plan, folder, progress)]
    outcomes = (*faults, *_wrong_config(plan, folder, record))
    table = _table(folder)
    used = sorted({taken.tensor for slot in table.slots for taken in taken_tensors(slot.origin)}) if table else []
    exact = [TensorOutcome(name=name, outcome=Outcome.EXACT) for name in used] if not faults else []
    verdict = Verdict.PASS if not outcomes else Verdict.FAIL
    if outcomes and all(entry.outcome is Outcome.INCONCLUSIVE for entry in outcomes):
        verdict = Verdict.INCONCLUSIVE
    return ReplayReport(
        verdict=verdict,
        outcomes=(*exact, *outcomes),
        n_bytes=sum(slot.n_bytes for slot in table.slots) if table else 0,
        tolerance=_TOLERANCE,
        seconds=time.monotonic() - started,
        is_ours=is_ours,
    )


def _faults(plan: MergePlan, folder: Path, progress: Progress | None) -> Iterator[str]:
    try:
        yield from replay_export(PlanSource(plan), folder, progress)
    except (ExportError, InputError) as error:
        yield error.message


def _wrong_config(plan: MergePlan, folder: Path, record: ExportRecord) -> Iterator[TensorOutcome]:
    components = plan.binding.checkpoint.components
    configs = {CONFIG_NAME: plan.config}
    if components:
        configs = {f"{graph}/{CONFIG_NAME}": plan.config[name] for name in components for graph in graphs_of(name)}
    for name, config in configs.items():
        expected = exported_config(config, str(record.options["dtype"]))
        found = read_json(folder / name) if (folder / name).is_file() else {}
        for key in sorted({*expected, *found}):
            if found.get(key) != expected.get(key):
                message = f"found {found.get(key)!r}, expected {expected.get(key)!r}"
                yield TensorOutcome(name=f"{name}:{key}", outcome=Outcome.WRONG_CONFIG, message=message)


def _table(folder: Path) -> BindingTable | None:
    try:
        return BindingTable.model_validate_json((folder / TABLE_NAME).read_bytes())
    except (OSError, ValueError):
        return None  # told by the replay
