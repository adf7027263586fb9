"""Make every check that is asked for and has a subject, in order, and keep what each found."""

from __future__ import annotations

from pathlib import Path

from lora_deploy.evidence.dossier import Evidence
from lora_deploy.evidence.options import VerifyOptions
from lora_deploy.evidence.outcome import NotApplicable
from lora_deploy.evidence.parity import ParityOptions, check_parity
from lora_deploy.evidence.parity_report import ParityReport
from lora_deploy.evidence.replay import ReplayReport, open_merged, replay
from lora_deploy.evidence.verdict import Check
from lora_deploy.merge.plan import MergePlan
from lora_deploy.merge.progress import Progress

_LEFT_OUT = NotApplicable(reason="left out by --only or --skip", is_skipped=True)


def gather(
    plan: MergePlan, folder: Path, options: VerifyOptions, *, is_ours: bool = False, progress: Progress | None = None
) -> Evidence:
    """Check a merged folder against its plan.

    Raises:
        InputError: The folder's files, the adapter's or the user's probes cannot be read.
        MemoryBudgetError: The plan's memory budget is too small for its replay.
    """
    replayed: ReplayReport | NotApplicable = _LEFT_OUT
    parity: ParityReport | NotApplicable = _LEFT_OUT
    if options.includes(Check.REPLAY):
        replayed = replay(plan, folder, is_ours=is_ours, progress=progress)
    if options.includes(Check.PARITY):
        parity_options = ParityOptions(probes=options.probes)
        parity = check_parity(plan, open_merged(folder), parity_options, progress=progress)
    return Evidence(replay=replayed, parity=parity, latency=NotApplicable(reason="there are no graphs"))
