"""Make every check that is asked for and has a subject, in order, and keep what each found."""

from __future__ import annotations

from pathlib import Path

from lora_deploy.evidence.dossier import Evidence
from lora_deploy.evidence.graph_parity import Graphs
from lora_deploy.evidence.graphs import GraphFolder, find_graphs
from lora_deploy.evidence.latency import LatencyOptions, LatencyReport, Proof, Prove, check_latency
from lora_deploy.evidence.options import VerifyOptions
from lora_deploy.evidence.outcome import NotApplicable
from lora_deploy.evidence.parity import ParityOptions, check_parity
from lora_deploy.evidence.parity_report import ParityReport
from lora_deploy.evidence.replay import ReplayReport, open_merged, replay
from lora_deploy.evidence.verdict import Check, Verdict
from lora_deploy.merge.plan import MergePlan
from lora_deploy.merge.progress import Progress

_LEFT_OUT = NotApplicable(reason="left out by --only or --skip", is_skipped=True)
_NO_GRAPHS = NotApplicable(reason="there are no graphs")


def gather(
    plan: MergePlan,
    folder: Path,
    options: VerifyOptions,
    *,
    is_ours: bool = False,
    prove: Prove | None = None,
    progress: Progress | None = None,
) -> Evidence:
    """Check a merged folder against its plan.

    ``prove`` compares two graphs operator for operator; without it latency rests on the measurement.

    Raises:
        InputError: The folder's files, the adapter's or the user's probes cannot be read.
        MemoryBudgetError: The plan's memory budget is too small for its replay.
        RecipeError: No provider has the name that was given.
    """
    replayed: ReplayReport | NotApplicable = _LEFT_OUT
    parity: ParityReport | NotApplicable = _LEFT_OUT
    latency: LatencyReport | NotApplicable = _LEFT_OUT
    merged, base = find_graphs(folder), find_graphs(options.base_graph) if options.base_graph else None
    if options.includes(Check.REPLAY):
        replayed = replay(plan, folder, is_ours=is_ours, progress=progress)
    if options.includes(Check.PARITY):
        graphs = Graphs(merged=merged, base=base, provider=options.provider) if merged else None
        chosen = ParityOptions(probes=options.probes)
        parity = check_parity(plan, open_merged(folder), chosen, graphs=graphs, progress=progress)
    if options.includes(Check.LATENCY):
        latency = _latency(merged, base, plan, options, prove, progress)
    return Evidence(replay=replayed, parity=parity, latency=latency)


def _latency(
    merged: GraphFolder | None,
    base: GraphFolder | None,
    plan: MergePlan,
    options: VerifyOptions,
    prove: Prove | None,
    progress: Progress | None,
) -> LatencyReport | NotApplicable:
    if merged is None:
        return _NO_GRAPHS
    chosen = LatencyOptions(bound=options.latency_bound, seconds=options.seconds, provider=options.provider)
    if base is None:
        reason = "there is no graph of the base to compare with"
        proof = Proof(is_equal=None, reason=reason)
        return LatencyReport(verdict=Verdict.INCONCLUSIVE, reason=reason, proof=proof, options=chosen)
    return check_latency(merged, base, plan.config, chosen, prove=prove, progress=progress)
