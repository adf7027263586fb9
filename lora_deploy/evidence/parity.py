"""Parity: do the merged weights, loaded from disk, do what the unmerged model does?

Promise: the reference is run in float32 by someone else's loader where there is one; every subject is compared at every
position of every probe; the tolerance is measured beside it, and a comparison that could not have seen a missing
adapter is inconclusive. A model that does not fit into memory is compared layer by layer, which the report says. What
cannot be run is said, not guessed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lora_deploy.checkpoint import Checkpoint
from lora_deploy.errors import EvidenceError, InconclusiveError
from lora_deploy.evidence.architecture import Absence, Architecture, find_architecture
from lora_deploy.evidence.chanced import DTypes
from lora_deploy.evidence.conventions import Conventions
from lora_deploy.evidence.forward import Outputs
from lora_deploy.evidence.graph_parity import GraphRuns, Graphs, graph_subjects, run_all
from lora_deploy.evidence.layerwise import NOTE, layerwise_bytes, run_layerwise
from lora_deploy.evidence.loading import as_folder
from lora_deploy.evidence.magnitude import RangeReport
from lora_deploy.evidence.outcome import NotApplicable
from lora_deploy.evidence.parity_report import ParityReport, SubjectReport
from lora_deploy.evidence.probe import SEED, Probe, make_probes
from lora_deploy.evidence.quantised_graphs import QuantisedGraphs
from lora_deploy.evidence.quantised_parity import quantised_report, run_quantised
from lora_deploy.evidence.quantised_report import QuantisedReport
from lora_deploy.evidence.reference_run import N_PASSES, ReferenceRun, needed_bytes, run_reference
from lora_deploy.evidence.reload import run_reloaded
from lora_deploy.evidence.runnable import WholeModel
from lora_deploy.evidence.subject import compare_subject
from lora_deploy.evidence.tolerance import Power, Share, Tolerance, merge_share
from lora_deploy.evidence.user_probe import read_probes
from lora_deploy.evidence.verdict import Verdict
from lora_deploy.evidence.versions import versions
from lora_deploy.merge.budget import available_bytes
from lora_deploy.merge.plan import MergePlan
from lora_deploy.merge.progress import Progress, reporting

_REPLAY_HINT = "the replay of its weights is what proves this merge; --skip parity says that it is enough"
_GRAPHS_LEFT_OUT = SubjectReport(
    name="onnx",
    verdict=Verdict.INCONCLUSIVE,
    reason="graphs run as a whole, and layer by layer there is nothing whole to compare them with",
    by_probe={},
    facts={},
)
_COARSE = (
    "quantise in a finer format (--quantize int8-blockwise, --block-size 16), or not at all; "
    "or give --probes that the adapter was trained for"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityOptions:
    """What the user may choose."""

    probes: Path | None = None
    """JSON lines with prompts, token ids, images or sounds, beside the random ones."""
    layerwise: bool = False
    """Compare layer by layer even where the whole model fits into memory."""


def check_parity(
    plan: MergePlan,
    merged: Checkpoint | None,
    options: ParityOptions | None = None,
    *,
    graphs: Graphs | None = None,
    quantised: Sequence[QuantisedGraphs] = (),
    progress: Progress | None = None,
) -> ParityReport | NotApplicable:
    """Compare a merged checkpoint, its graphs and its quantised ones with the unmerged model.

    Without a checkpoint (a direct export), the graphs alone are compared.

    Raises:
        InputError: The user's probes cannot be read, or the adapter's file is not the one that was merged.
    """
    started = time.monotonic()
    architecture = find_architecture(plan.config)
    if isinstance(architecture, Absence):
        if not architecture.is_applicable:
            return NotApplicable(reason=architecture.reason)
        return unmeasured(architecture.reason, architecture.hint)
    if merged is not None:
        root = merged.root
    elif graphs is not None:
        root = graphs.merged.root
    else:
        return unmeasured("a quantised export is compared with merged weights, and there are none", "merge first")
    conventions = Conventions.of(plan.config, root)
    probes = make_probes(plan.config, architecture, conventions=conventions)
    if options is not None and options.probes is not None:
        probes += read_probes(options.probes, root, conventions, architecture)
    needed, available = needed_bytes(plan, probes, n_graphs=4 * len(quantised)), available_bytes()
    is_too_large = available is not None and needed > available
    if is_too_large or (options is not None and options.layerwise):
        why = f"the unmerged model needs {needed / 1e9:.1f} GB of memory, {(available or 0) / 1e9:.1f} GB are free"
        if merged is None:
            return unmeasured(f"{why}; layer by layer: {_GRAPHS_LEFT_OUT.reason}", _REPLAY_HINT)
        report = _layer_by_layer(
            plan,
            merged,
            architecture,
            probes,
            progress,
            why=why if is_too_large else "asked for",
            has_graphs=bool(graphs or quantised),
        )
    else:
        with reporting(progress, "measuring parity", (N_PASSES + 1) * plan.n_bytes) as advance:
            report = _measure(plan, merged, architecture, probes, _Exports(graphs, quantised), advance)
    return replace(report, seconds=time.monotonic() - started)


def _layer_by_layer(
    plan: MergePlan,
    merged: Checkpoint,
    architecture: Architecture,
    probes: Sequence[Probe],
    progress: Progress | None,
    *,
    why: str,
    has_graphs: bool,
) -> ParityReport:
    try:
        needed, available = layerwise_bytes(plan, architecture, probes), available_bytes()
        if available is not None and needed > available:
            return unmeasured(f"{why}; layer by layer it needs {needed / 1e9:.1f} GB", _REPLAY_HINT)
        dtypes = DTypes.of(merged.tensors, {tensor.spec.name for tensor in plan.tensors if tensor.updates})
        with reporting(progress, "measuring parity layer by layer", 2 * plan.n_bytes) as advance:
            found = run_layerwise(plan, merged, architecture, probes, dtypes, advance)
    except EvidenceError as error:
        return unmeasured(f"{why}; layer by layer: {error.message}", _REPLAY_HINT)
    if isinstance(found, Absence):
        return unmeasured(f"{why}; {found.reason}", found.hint or _REPLAY_HINT)
    report = ParityReport(
        verdict=Verdict.PASS,
        reference=f"{architecture.name}, float32, {found.source}",
        way="layer by layer",
        is_independent=found.is_independent,
        dtype=dtypes.usual.long_name,
        subjects=(*found.subjects, *([_GRAPHS_LEFT_OUT] if has_graphs else [])),
        power=found.power,
        effect=found.effect,
        magnitudes=found.magnitudes,
        probes={probe.name: probe.description for probe in probes},
        seed=SEED,
        notes=(f"{NOTE} ({why})", *_notes(found.magnitudes, is_independent=found.is_independent)),
        versions=versions(),
    )
    return judged(report)


class _Exports:
    """Every export that is compared; each is run once."""

    def __init__(self, graphs: Graphs | None, quantised: Sequence[QuantisedGraphs]) -> None:
        self._quantised = quantised
        self._plain = list(dict.fromkeys([graphs, *(entry.plain for entry in quantised)]))
        self._runs: dict[Graphs, GraphRuns] = {}
        self._quantised_runs: dict[str, GraphRuns] = {}

    def run(self, probes: Sequence[Probe]) -> frozenset[torch.dtype]:
        """Run them all; gives the formats that they compute in."""
        only_prefill_base = not self._quantised
        self._runs = {g: run_all(g, probes, only_prefill_base=only_prefill_base) for g in self._plain if g is not None}
        self._quantised_runs = {entry.name: run_quantised(entry, probes) for entry in self._quantised}
        runs = (*self._runs.values(), *self._quantised_runs.values())
        return frozenset(run.dtype for run in runs if run.dtype is not None)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was not run, and why."""
        return tuple(note for run in (*self._runs.values(), *self._quantised_runs.values()) for note in run.notes)

    def subjects(self, probes: Sequence[Probe], reference: ReferenceRun, dtype: str) -> Iterator[SubjectReport]:
        """Judge what is not quantised."""
        for runs in self._runs.values():
            yield from graph_subjects(runs, probes, reference, dtype)

    def reports(self, reference: ReferenceRun, reloaded: Outputs | None) -> Iterator[QuantisedReport]:
        """Judge what is."""
        for entry in self._quantised:
            plain = self._runs[entry.plain] if entry.plain is not None else None
            runs = self._quantised_runs[entry.name]
            yield quantised_report(entry, runs, plain, reference, reloaded)


def _measure(
    plan: MergePlan,
    merged: Checkpoint | None,
    architecture: Architecture,
    probes: Sequence[Probe],
    exports: _Exports,
    advance: Callable[[int], None],
) -> ParityReport:
    adapted = {tensor.spec.name for tensor in plan.tensors if tensor.updates}
    stored = merged.tensors if merged is not None else {tensor.spec.name: tensor.spec for tensor in plan.tensors}
    dtypes = DTypes.of(stored, adapted)
    graph_dtypes, model = exports.run(probes), WholeModel(architecture.name)
    try:
        reference = run_reference(plan, model, probes, dtypes, advance, graph_dtypes=graph_dtypes)
    except EvidenceError as error:
        return unmeasured(f"the base cannot be run: {error.message}", "")
    if isinstance(reference, Absence):
        return unmeasured(reference.reason, reference.hint)
    shares = merge_share(reference.roundings, dtypes.usual.long_name)
    reloaded, outputs = (
        (None, None) if merged is None else reload_and_judge(merged, model.spec, probes, reference, shares)
    )
    advance(plan.n_bytes)
    subjects = (*([reloaded] if reloaded else []), *exports.subjects(probes, reference, dtypes.usual.long_name))
    power = weakest_power(reference, subjects)
    report = ParityReport(
        verdict=Verdict.PASS,
        reference=f"{architecture.name}, float32, {reference.source}",
        is_independent=reference.is_independent,
        dtype=dtypes.usual.long_name,
        subjects=subjects,
        quantised=tuple(exports.reports(reference, outputs)),
        power=power,
        effect=reference.effect,
        magnitudes=reference.magnitudes,
        probes={probe.name: probe.description for probe in probes},
        seed=SEED,
        notes=(
            *_notes(reference.magnitudes, is_independent=reference.is_independent),
            *_unseen(architecture, plan, probes),
            *exports.notes,
        ),
        versions=versions(),
    )
    return judged(report)


def judged(report: ParityReport) -> ParityReport:
    """Give a report its verdict: one failure fails, and what is unmeasured, or changed without power, is inconclusive.

    An output that the adapter leaves as it is, to the bit, needs no power.
    """
    judged_ones: tuple[SubjectReport | QuantisedReport, ...] = (*report.subjects, *report.quantised)
    failed = [subject for subject in judged_ones if subject.verdict is Verdict.FAIL]
    open_ones = [subject for subject in judged_ones if subject.verdict is Verdict.INCONCLUSIVE]
    if failed:
        reasons = "; ".join(f"{subject.name}: {subject.reason}" for subject in failed)
        hint = "" if any(subject in report.subjects for subject in failed) else _COARSE
        return replace(report, verdict=Verdict.FAIL, reason=reasons, hint=hint)
    if report.magnitudes is not None and report.magnitudes.verdict is Verdict.FAIL:
        hint = "merge with --dtype bfloat16 or --dtype base"
        return replace(report, verdict=Verdict.FAIL, reason=report.magnitudes.warning, hint=hint)
    if open_ones:
        reasons = "; ".join(f"{subject.name}: {subject.reason}" for subject in open_ones)
        return replace(report, verdict=Verdict.INCONCLUSIVE, reason=reasons)
    weak = [power for power in report.power if power.effect and not power.is_enough]
    if weak or not any(power.is_enough for power in report.power):
        worst = min(weak, key=lambda power: power.ratio, default=None)
        where = f"{worst.output}: " if worst is not None and len(report.power) > 1 else ""
        ratio = worst.ratio if worst is not None else 0.0
        reason = (
            f"{where}the adapter's effect is {ratio:.2g} times the tolerance: a missing adapter would hardly have shown"
        )
        hint = "give --probes that the adapter was trained for, or merge with a finer --dtype"
        return replace(report, verdict=Verdict.INCONCLUSIVE, reason=reason, hint=hint)
    return replace(report, verdict=Verdict.PASS)


def reload_and_judge(
    merged: Checkpoint,
    spec: str,
    probes: Sequence[Probe],
    reference: ReferenceRun,
    shares: Mapping[str, Share],
) -> tuple[SubjectReport, Outputs | None]:
    """Judge a merged checkpoint, loaded and run by another process; gives its outputs, too, where it ran."""
    name = "merged checkpoint, reloaded"
    try:
        with as_folder(merged) as folder:
            found = run_reloaded(folder, spec, probes)
    except EvidenceError as error:
        return SubjectReport(name=name, verdict=Verdict.FAIL, reason=error.message, by_probe={}, facts={}), None
    except InconclusiveError as error:
        report = SubjectReport(name=name, verdict=Verdict.INCONCLUSIVE, reason=error.message, by_probe={}, facts={})
        return report, None
    facts = {
        "load_seconds": found.load_seconds,
        "run_seconds": found.run_seconds,
        "peak_bytes": found.peak_bytes,
    }
    lost = [entry for entry in found.missing if entry not in reference.missing]
    if lost:
        reason = f"{len(lost)} parameters are missing, first {lost[0]}"
        report = SubjectReport(name=name, verdict=Verdict.FAIL, reason=reason, by_probe={}, facts=facts)
        return report, found.outputs
    tolerances = {output: Tolerance(output=output, shares=(share,)) for output, share in shares.items()}
    return compare_subject(name, found.outputs, reference.outputs, tolerances, facts), found.outputs


def weakest_power(reference: ReferenceRun, subjects: Sequence[SubjectReport]) -> tuple[Power, ...]:
    """Effect by the widest tolerance that any subject was judged with."""
    widest: dict[str, float] = {}
    for bound in (bound for subject in subjects for bound in subject.tolerances):
        widest[bound.output] = max(bound.mean, widest.get(bound.output, 0.0))
    return tuple(
        Power(output=entry.output, effect=entry.mean, tolerance=widest[entry.output])
        for entry in reference.effect
        if entry.output in widest
    )


def _notes(magnitudes: RangeReport, *, is_independent: bool) -> tuple[str, ...]:
    notes = []
    if not is_independent:
        notes.append("shares our reader: a scale that was read wrongly would be on both sides")
    if magnitudes.warning and magnitudes.verdict is Verdict.PASS:
        notes.append(magnitudes.warning)
    return tuple(notes)


def _unseen(architecture: Architecture, plan: MergePlan, probes: Sequence[Probe]) -> tuple[str, ...]:
    """Say that a model of images and texts was shown texts alone."""
    sees = "pixel_values" in architecture.arguments and "vision_config" in plan.config
    if not sees or any("pixel_values" in probe.inputs for probe in probes):
        return ()
    return (f"texts alone were probed: what {architecture.name} wants besides pixels is not known; give --probes",)


def unmeasured(reason: str, hint: str) -> ParityReport:
    """Say why nothing was measured."""
    return ParityReport(verdict=Verdict.INCONCLUSIVE, reason=reason, hint=hint, probes={}, versions=versions())
