"""Evidence for a diffusion pipeline: every component's weights and graphs, and the whole once to its end."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from lora_deploy.errors import EvidenceError, ExportError, InputError
from lora_deploy.evidence.component import Component
from lora_deploy.evidence.dossier import Evidence
from lora_deploy.evidence.export_replay import replay_direct
from lora_deploy.evidence.exported_base import exported_base
from lora_deploy.evidence.gather import LEFT_OUT, NO_GRAPHS
from lora_deploy.evidence.graphs import GraphFolder, find_pipeline_graphs
from lora_deploy.evidence.latency import LatencyOptions, LatencyReport, Proof, Prove, check_latency, prove_by
from lora_deploy.evidence.options import VerifyOptions
from lora_deploy.evidence.outcome import NotApplicable, Outcome, TensorOutcome
from lora_deploy.evidence.parity import ParityOptions
from lora_deploy.evidence.parity_report import ParityReport
from lora_deploy.evidence.picture import draw, heard, load_pipeline
from lora_deploy.evidence.pipeline_parity import PipelineGraphs, check_pipeline_parity
from lora_deploy.evidence.probe import Probe
from lora_deploy.evidence.replay import ReplayReport, open_merged, replay
from lora_deploy.evidence.verdict import Check, Verdict
from lora_deploy.export.canonical import canonical_digest, first_difference
from lora_deploy.export.record import RECORD_NAME, read_record
from lora_deploy.export.replay import replay_export
from lora_deploy.export.sources import CheckpointSource
from lora_deploy.merge.plan import MergePlan
from lora_deploy.merge.progress import Progress

_DENOISERS = ("unet", "transformer")
_NO_CONTRAST = "an unmerged graph is made for single models only"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Export:
    """An exported pipeline, and its base exported as it was."""

    root: Path
    merged: Mapping[str, GraphFolder]
    base: Mapping[str, GraphFolder] = field(default_factory=dict)
    why_no_base: str = ""


def gather_pipeline(
    plan: MergePlan,
    folder: Path,
    options: VerifyOptions,
    *,
    is_ours: bool,
    is_direct: bool,
    progress: Progress | None = None,
) -> Evidence:
    """Check a merged pipeline, or a direct export of one, against its plan.

    Raises:
        InputError: The folder's files, the adapter's or the user's probes cannot be read.
        MemoryBudgetError: The plan's memory budget is too small for its replay.
        RecipeError: No provider has the name that was given.
    """
    replayed: ReplayReport | NotApplicable = LEFT_OUT
    parity: ParityReport | NotApplicable = LEFT_OUT
    latency: LatencyReport | NotApplicable = LEFT_OUT
    merged = None if is_direct else open_merged(folder)
    with ExitStack() as stack:
        export = _export(plan, folder, options, stack, progress)
        faults: tuple[str, ...] = ()
        if is_direct and export is None:
            raise InputError(f"{folder}: its graphs are not there", hint="export once more, with --fresh")
        if merged is not None and export is not None:
            faults = _faults(CheckpointSource(merged, {}), export.root, progress)
        if options.includes(Check.REPLAY) and is_direct:
            replayed = replay_direct(plan, folder, read_record(folder), is_ours=is_ours, progress=progress)
        elif options.includes(Check.REPLAY):
            replayed = _with_faults(replay(plan, folder, is_ours=is_ours, progress=progress), export, faults)
        if options.includes(Check.PARITY):
            pair = None
            if export is not None:
                pair = PipelineGraphs(merged=export.merged, base=export.base, provider=options.provider)
            chosen = ParityOptions(probes=options.probes)
            parity = check_pipeline_parity(plan, merged, chosen, graphs=pair, progress=progress)
        if options.includes(Check.LATENCY):
            latency = _latency(plan, export, faults, options, progress) if export is not None else NO_GRAPHS
    return Evidence(replay=replayed, parity=parity, latency=latency)


def _export(
    plan: MergePlan, folder: Path, options: VerifyOptions, stack: ExitStack, progress: Progress | None
) -> _Export | None:
    found = find_pipeline_graphs(folder)
    if found is None:
        return None
    root, graphs = found
    if not (options.includes(Check.PARITY) or options.includes(Check.LATENCY)):
        return _Export(root=root, merged=graphs)
    base = stack.enter_context(exported_base(plan, read_record(root), progress, find=find_pipeline_graphs))
    if isinstance(base, str):
        return _Export(root=root, merged=graphs, why_no_base=base)
    return _Export(root=root, merged=graphs, base=base[1])


def _faults(source: CheckpointSource, root: Path, progress: Progress | None) -> tuple[str, ...]:
    try:
        return tuple(replay_export(source, root, progress))
    except (ExportError, InputError) as error:
        return (error.message,)


def _with_faults(report: ReplayReport, export: _Export | None, faults: tuple[str, ...]) -> ReplayReport:
    """Count what the graphs read wrongly among what was found wrong."""
    if export is None or not faults:
        return report
    name = f"{export.root.name}/{RECORD_NAME}"
    found = [TensorOutcome(name=name, outcome=Outcome.WRONG_GRAPH, message=fault) for fault in faults]
    return replace(report, verdict=Verdict.FAIL, outcomes=(*report.outcomes, *found))


def _latency(
    plan: MergePlan, export: _Export, faults: tuple[str, ...], options: VerifyOptions, progress: Progress | None
) -> LatencyReport:
    """Prove that all graphs are the base's, and time what runs at every step: the denoiser."""
    chosen = LatencyOptions(bound=options.latency_bound, seconds=options.seconds, provider=options.provider)
    name = next((name for name in _DENOISERS if name in export.merged and name in export.base), None)
    if name is None:
        reason = export.why_no_base or "it has no denoiser that could be timed"
        proof = Proof(is_equal=None, reason=reason)
        return LatencyReport(verdict=Verdict.INCONCLUSIVE, reason=reason, proof=proof, options=chosen)
    proof = _proof(export, faults)
    try:
        workload = _step(plan, name)
    except EvidenceError as error:
        verdict = Verdict.PASS if proof.is_equal else Verdict.INCONCLUSIVE
        reason = "" if proof.is_equal else error.message
        return LatencyReport(verdict=verdict, reason=reason, proof=proof, options=chosen)
    report = check_latency(
        export.merged[name],
        export.base[name],
        plan.config[name],
        chosen,
        prove=lambda _, __: proof,
        workload=workload,
        progress=progress,
    )
    return replace(report, why_no_contrast=_NO_CONTRAST)


def _step(plan: MergePlan, name: str) -> Probe:
    """Give what the base's pipeline gives its denoiser at the first step."""
    pipeline = load_pipeline(plan.binding.checkpoint.root, plan.binding.options.variant)
    with heard(pipeline, [Component(name=name, graph=name)]) as calls:
        draw(pipeline)
    return Probe(name=f"one step of {name}", inputs=calls[name].inputs[0])


def _proof(export: _Export, faults: tuple[str, ...]) -> Proof:
    if faults:
        return Proof(is_equal=False, reason=faults[0])
    if export.merged.keys() != export.base.keys():
        return Proof(is_equal=False, reason=f"{len(export.base)} graphs became {len(export.merged)}")
    compare: Prove = prove_by(canonical_digest, first_difference)
    proofs = {name: compare(export.base[name].prefill, graph.prefill) for name, graph in export.merged.items()}
    different = next(((name, proof) for name, proof in proofs.items() if not proof.is_equal), None)
    if different is not None:
        return Proof(is_equal=different[1].is_equal, reason=f"{different[0]}: {different[1].reason}")
    return Proof(is_equal=True, reason="; ".join(f"{name}: {proof.reason}" for name, proof in proofs.items()))
