"""Make every check that is asked for and has a subject, in order, and keep what each found."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from lora_deploy.errors import ExportError, InputError
from lora_deploy.evidence.dossier import Evidence
from lora_deploy.evidence.export_replay import replay_direct
from lora_deploy.evidence.exported_base import exported_base
from lora_deploy.evidence.graph_parity import Graphs
from lora_deploy.evidence.graphs import GraphFolder, find_graphs
from lora_deploy.evidence.latency import LatencyOptions, LatencyReport, Proof, Prove, check_latency, prove_by
from lora_deploy.evidence.options import VerifyOptions
from lora_deploy.evidence.outcome import NotApplicable, Outcome, TensorOutcome
from lora_deploy.evidence.parity import ParityOptions, check_parity
from lora_deploy.evidence.parity_report import ParityReport
from lora_deploy.evidence.quantised_graphs import Companions, QuantisedGraphs, find_quantised, record_in
from lora_deploy.evidence.replay import ReplayReport, open_merged, replay
from lora_deploy.evidence.unmerged_graph import unmerged_graph
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
    record: ExportRecord | None
    base: GraphFolder | None = None
    why_no_base: str = ""
    faults: tuple[str, ...]
    """What in them is not what the merged weights give."""
    doubt: str | None = None
    """Why a fault may be none."""
    compared: QuantisedGraphs | None = None
    """What they are compared with, where they are quantised."""

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.merged.root.name

    def pair(self, provider: str) -> Graphs:
        """Both models' graphs."""
        return Graphs(merged=self.merged, base=self.base, provider=provider)

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
    is_direct: bool = False,
    progress: Progress | None = None,
) -> Evidence:
    """Check a merged folder against its plan; ``is_direct`` says that it is an export without a merged checkpoint.

    Raises:
        InputError: The folder's files, the adapter's or the user's probes cannot be read.
        MemoryBudgetError: The plan's memory budget is too small for its replay.
        RecipeError: No provider has the name that was given.
    """
    replayed: ReplayReport | NotApplicable = LEFT_OUT
    parity: ParityReport | NotApplicable = LEFT_OUT
    latency: LatencyReport | NotApplicable = LEFT_OUT
    quantised_latency: dict[str, LatencyReport] = {}
    with ExitStack() as stack:
        graphs = _graphs(plan, folder, options, stack, progress, is_direct=is_direct)
        quantised = [] if is_direct else _quantised(plan, folder, options, graphs, stack, progress)
        if is_direct and options.includes(Check.REPLAY):
            replayed = replay_direct(plan, folder, read_record(folder), is_ours=is_ours, progress=progress)
        elif options.includes(Check.REPLAY):
            replayed = replay(plan, folder, is_ours=is_ours, progress=progress)
            for found in (graphs, *quantised):
                if found is not None and found.faults:
                    replayed = _with_faults(replayed, found)
        if options.includes(Check.PARITY):
            parity = check_parity(
                plan,
                None if is_direct else open_merged(folder),
                ParityOptions(probes=options.probes, layerwise=options.layerwise),
                graphs=graphs.pair(options.provider) if graphs else None,
                quantised=[found.compared for found in quantised if found.compared],
                progress=progress,
            )
        if options.includes(Check.LATENCY):
            latency = _latency(graphs, plan, options, progress) if graphs else NO_GRAPHS
            quantised_latency = {found.name: _latency(found, plan, options, progress) for found in quantised}
    return Evidence(replay=replayed, parity=parity, latency=latency, quantised_latency=quantised_latency)


def _graphs(
    plan: MergePlan,
    folder: Path,
    options: VerifyOptions,
    stack: ExitStack,
    progress: Progress | None,
    *,
    is_direct: bool,
) -> _Graphs | None:
    merged = find_graphs(folder)
    if merged is None and is_direct:
        raise InputError(f"{folder}: its graphs are not there", hint="export once more, with --fresh")
    record = record_in(merged.root) if merged is not None else None
    if merged is None or (record is not None and "quantisation" in record.options):
        return None
    faults = _faults(folder, merged, options, progress) if record is not None and not is_direct else ()
    if not _runs(options):
        return _Graphs(merged=merged, record=record, faults=faults)
    if options.base_graph is not None:
        base: GraphFolder | str = find_graphs(options.base_graph) or f"{options.base_graph}: holds no graphs"
    elif record is None:
        base = f"{merged.root}: was not exported by lora-deploy, so how the base would be is unknown"
    else:
        base = stack.enter_context(exported_base(plan, record, progress))
    if isinstance(base, str):
        return _Graphs(merged=merged, record=record, why_no_base=base, faults=faults)
    return _Graphs(merged=merged, record=record, base=base, faults=faults)


def _quantised(
    plan: MergePlan,
    folder: Path,
    options: VerifyOptions,
    plain: _Graphs | None,
    stack: ExitStack,
    progress: Progress | None,
) -> list[_Graphs]:
    """Find quantised exports, and export what each is compared with."""
    exports = find_quantised(folder)
    if not exports:
        return []
    companions = Companions(plan, open_merged(folder), stack, progress)
    if plain is not None and plain.record is not None and plain.base is not None and not plain.faults:
        companions.know(plain.record, plain.pair(options.provider))
    found = []
    for export in exports:
        faults = _faults(folder, export.graphs, options, progress)
        graphs = _Graphs(merged=export.graphs, record=export.record, faults=faults, doubt=export.other_quantiser)
        if _runs(options):
            compared = companions.of(export, options.provider)
            base = compared.quantised.base
            graphs = replace(graphs, base=base, why_no_base=compared.problem, compared=compared)
        found.append(graphs)
    return found


def _runs(options: VerifyOptions) -> bool:
    """Whether graphs are run at all."""
    return options.includes(Check.PARITY) or options.includes(Check.LATENCY)


def _faults(folder: Path, graphs: GraphFolder, options: VerifyOptions, progress: Progress | None) -> tuple[str, ...]:
    """Say what in an export is not what the merged weights give."""
    if not (options.includes(Check.REPLAY) or options.includes(Check.LATENCY)):
        return ()
    try:
        return tuple(replay_export(CheckpointSource(open_merged(folder), {}), graphs.root, progress))
    except (ExportError, InputError) as error:
        return (error.message,)


def _with_faults(report: ReplayReport, graphs: _Graphs) -> ReplayReport:
    """Count what the graphs read wrongly among what was found wrong."""
    name = f"{graphs.name}/{RECORD_NAME}"
    outcome = Outcome.INCONCLUSIVE if graphs.doubt else Outcome.WRONG_GRAPH
    doubt = f" ({graphs.doubt})" if graphs.doubt else ""
    found = [TensorOutcome(name=name, outcome=outcome, message=fault + doubt) for fault in graphs.faults]
    is_open = graphs.doubt and report.verdict is not Verdict.FAIL
    verdict = Verdict.INCONCLUSIVE if is_open else Verdict.FAIL
    return replace(report, verdict=verdict, outcomes=(*report.outcomes, *found))


def _latency(graphs: _Graphs, plan: MergePlan, options: VerifyOptions, progress: Progress | None) -> LatencyReport:
    chosen = LatencyOptions(bound=options.latency_bound, seconds=options.seconds, provider=options.provider)
    if graphs.base is None:
        proof = Proof(is_equal=None, reason=graphs.why_no_base)
        return LatencyReport(verdict=Verdict.INCONCLUSIVE, reason=graphs.why_no_base, proof=proof, options=chosen)
    with unmerged_graph(plan, graphs.base) as unmerged:
        contrast = unmerged if isinstance(unmerged, GraphFolder) else None
        report = check_latency(
            graphs.merged,
            graphs.base,
            plan.config,
            chosen,
            prove=graphs.prove,
            contrast=contrast,
            progress=progress,
        )
    return replace(report, why_no_contrast=unmerged) if isinstance(unmerged, str) else report
