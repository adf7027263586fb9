"""Make every check that is asked for and has a subject, in order, and keep what each found."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from lora_deploy.errors import ExportError, InputError
from lora_deploy.evidence.dossier import Evidence
from lora_deploy.evidence.exported_base import exported_base
from lora_deploy.evidence.graph_parity import Graphs
from lora_deploy.evidence.graphs import GraphFolder, find_graphs
from lora_deploy.evidence.latency import LatencyOptions, LatencyReport, Proof, Prove, check_latency, prove_by
from lora_deploy.evidence.options import VerifyOptions
from lora_deploy.evidence.outcome import NotApplicable, Outcome, TensorOutcome
from lora_deploy.evidence.parity import ParityOptions, check_parity
from lora_deploy.evidence.parity_report import ParityReport
from lora_deploy.evidence.replay import ReplayReport, open_merged, replay
from lora_deploy.evidence.verdict import Check, Verdict
from lora_deploy.export.canonical import canonical_digest, first_difference
from lora_deploy.export.record import RECORD_NAME, ExportRecord, read_record
from lora_deploy.export.replay import replay_export
from lora_deploy.export.sources import CheckpointSource
from lora_deploy.merge.plan import MergePlan
from lora_deploy.merge.progress import Progress

LEFT_OUT = NotApplicable(reason="left out by --only or --skip", is_skipped=True)
NO_GRAPHS = NotApplicable(reason="there are no graphs")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Graphs:
    """The merged graphs, and what is known about them before anything runs."""

    merged: GraphFolder
    base: GraphFolder | None
    why_no_base: str
    faults: tuple[str, ...]
    """What in them is not what the merged weights give."""

    @property
    def prove(self) -> Prove:
        """Compare operators, then demand that the weights were replayed."""
        compare = prove_by(canonical_digest, first_difference)
        if not self.faults:
            return compare
        stale = Proof(is_equal=False, reason=self.faults[0])
        return lambda base, merged: found if (found := compare(base, merged)).is_equal is False else stale


def gather(
    plan: MergePlan,
    folder: Path,
    options: VerifyOptions,
    *,
    is_ours: bool = False,
    progress: Progress | None = None,
) -> Evidence:
    """Check a merged folder against its plan.

    Raises:
        InputError: The folder's files, the adapter's or the user's probes cannot be read.
        MemoryBudgetError: The plan's memory budget is too small for its replay.
        RecipeError: No provider has the name that was given.
    """
    replayed: ReplayReport | NotApplicable = LEFT_OUT
    parity: ParityReport | NotApplicable = LEFT_OUT
    latency: LatencyReport | NotApplicable = LEFT_OUT
    with ExitStack() as stack:
        graphs = _graphs(plan, folder, options, stack, progress)
        if options.includes(Check.REPLAY):
            replayed = replay(plan, folder, is_ours=is_ours, progress=progress)
            if graphs is not None and graphs.faults:
                replayed = _with_faults(replayed, graphs)
        if options.includes(Check.PARITY):
            pair = Graphs(merged=graphs.merged, base=graphs.base, provider=options.provider) if graphs else None
            chosen = ParityOptions(probes=options.probes)
            parity = check_parity(plan, open_merged(folder), chosen, graphs=pair, progress=progress)
        if options.includes(Check.LATENCY):
            latency = _latency(graphs, plan, options, progress) if graphs else NO_GRAPHS
    return Evidence(replay=replayed, parity=parity, latency=latency)


def _graphs(
    plan: MergePlan, folder: Path, options: VerifyOptions, stack: ExitStack, progress: Progress | None
) -> _Graphs | None:
    merged = find_graphs(folder)
    if merged is None:
        return None
    record = _record(merged)
    faults: tuple[str, ...] = ()
    if record is not None and (options.includes(Check.REPLAY) or options.includes(Check.LATENCY)):
        try:
            faults = tuple(replay_export(CheckpointSource(open_merged(folder), {}), merged.root, progress))
        except (ExportError, InputError) as error:
            faults = (error.message,)
    if not (options.includes(Check.PARITY) or options.includes(Check.LATENCY)):
        return _Graphs(merged=merged, base=None, why_no_base="", faults=faults)
    if options.base_graph is not None:
        base: GraphFolder | str = find_graphs(options.base_graph) or f"{options.base_graph}: holds no graphs"
    elif record is None:
        base = f"{merged.root}: was not exported by lora-deploy, so how the base would be is unknown"
    else:
        base = stack.enter_context(exported_base(plan, record, progress))
    if isinstance(base, str):
        return _Graphs(merged=merged, base=None, why_no_base=base, faults=faults)
    return _Graphs(merged=merged, base=base, why_no_base="", faults=faults)


def _record(merged: GraphFolder) -> ExportRecord | None:
    try:
        return read_record(merged.root)
    except InputError:
        return None  # another exporter's, or nobody's


def _with_faults(report: ReplayReport, graphs: _Graphs) -> ReplayReport:
    """Count what the graphs read wrongly among what was found wrong."""
    name = f"{graphs.merged.root.name}/{RECORD_NAME}"
    found = [TensorOutcome(name=name, outcome=Outcome.WRONG_GRAPH, message=fault) for fault in graphs.faults]
    return replace(report, verdict=Verdict.FAIL, outcomes=(*report.outcomes, *found))


def _latency(graphs: _Graphs, plan: MergePlan, options: VerifyOptions, progress: Progress | None) -> LatencyReport:
    chosen = LatencyOptions(bound=options.latency_bound, seconds=options.seconds, provider=options.provider)
    if graphs.base is None:
        proof = Proof(is_equal=None, reason=graphs.why_no_base)
        return LatencyReport(verdict=Verdict.INCONCLUSIVE, reason=graphs.why_no_base, proof=proof, options=chosen)
    return check_latency(graphs.merged, graphs.base, plan.config, chosen, prove=graphs.prove, progress=progress)
