"""The merged model's graphs beside the unmerged model: whole texts, decoding over a cache, greedy tokens.

The export share comes from the base's own graph beside the base in torch, at the same stored weights. Without one it is
what float32 arithmetic itself leaves open, the base in float32 beside float64; that is no measure for graphs that
compute in 16 bits, where exceeding it is inconclusive, not a failure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_deploy.errors import EvidenceError, InconclusiveError
from lora_deploy.evidence.divergence import Divergences, at_positions, compare_outputs, join
from lora_deploy.evidence.forward import LOGITS, Outputs
from lora_deploy.evidence.graphs import GraphFolder
from lora_deploy.evidence.onnx_subject import OnnxRun, run_graphs
from lora_deploy.evidence.parity_report import SubjectReport
from lora_deploy.evidence.probe import Probe
from lora_deploy.evidence.reference_run import ReferenceRun
from lora_deploy.evidence.subject import compare_subject
from lora_deploy.evidence.tolerance import Share, Tolerance, export_limit, merge_share, single_share
from lora_deploy.evidence.verdict import Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Graphs:
    """The graphs to compare."""

    merged: GraphFolder
    base: GraphFolder | None = None
    """The same export of the base."""
    provider: str = "cpu"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GraphRuns:
    """What the graphs gave, before there is anything to compare it with."""

    merged: OnnxRun | SubjectReport
    """A report where they did not run."""
    base: OnnxRun | None = None
    base_problem: str = ""

    @property
    def notes(self) -> tuple[str, ...]:
        """What was not run, and why."""
        if not isinstance(self.merged, OnnxRun):
            return ()
        return tuple(f"onnx: {name} left out: {reason}" for name, reason in self.merged.left_out.items())

    @property
    def dtype(self) -> torch.dtype | None:
        """Format that the merged graph computes in; None where it does not run."""
        return self.merged.dtype if isinstance(self.merged, OnnxRun) else None


def run_all(graphs: Graphs, probes: Sequence[Probe], *, only_prefill_base: bool = True) -> GraphRuns:
    """Run the merged graphs, and the base's where there is one: all of it, or only reading whole texts.

    Raises:
        RecipeError: No provider has that name.
    """
    try:
        merged = run_graphs(graphs.merged, probes, provider=graphs.provider)
    except EvidenceError as error:
        return GraphRuns(merged=_not_run(Verdict.FAIL, error.message))
    except InconclusiveError as error:
        return GraphRuns(merged=_not_run(Verdict.INCONCLUSIVE, error.message))
    if graphs.base is None:
        return GraphRuns(merged=merged)
    try:
        base = run_graphs(graphs.base, probes, provider=graphs.provider, only_prefill=only_prefill_base)
        return GraphRuns(merged=merged, base=base)
    except (EvidenceError, InconclusiveError) as error:
        return GraphRuns(merged=merged, base_problem=error.message)


def _not_run(verdict: Verdict, reason: str) -> SubjectReport:
    return SubjectReport(name="onnx", verdict=verdict, reason=reason, by_probe={}, facts={})


def graph_subjects(
    runs: GraphRuns, probes: Sequence[Probe], reference: ReferenceRun, dtype: str
) -> tuple[SubjectReport, ...]:
    """Judge what the graphs gave; ``dtype`` is the format that most adapted weights are stored in."""
    run = runs.merged
    if isinstance(run, SubjectReport):
        return (run,)
    floors = _Floors(runs, reference, dtype)
    fault = floors.fault_of_base()
    if fault is not None:
        return (_not_run(Verdict.FAIL, fault),)
    tolerances, facts = floors.tolerances(), {**run.facts, "export_limits": floors.limits()}
    found = [_whole(compare_subject("onnx prefill", run.prefill, reference.outputs, tolerances, facts), run)]
    for title, names in _by_batch(run, probes).items():
        rows = {name: run.decode[name] for name in names}
        kept = {name: run.decoding[name].is_decoded for name in names}
        expected: Outputs = {name: {LOGITS: reference.outputs[name][LOGITS][kept[name]]} for name in names}
        found.append(compare_subject(f"onnx decode over a cache, {title}", rows, expected, floors.tolerances(kept), {}))
    if run.greedy:
        found.append(compare_subject("onnx greedy", run.greedy, reference.outputs, tolerances, {}))
    if runs.base is None and run.dtype is not torch.float32:
        return tuple(_softened(subject, runs.base_problem) for subject in found)
    return tuple(found)


def _whole(subject: SubjectReport, run: OnnxRun) -> SubjectReport:
    """Take a pass back where the graphs do not take what the model takes.

    A graph that reads a text with images in it is made for one of each, which the export says.
    """
    names = {name for session in run.inputs for name in session}
    if subject.verdict is not Verdict.PASS or not run.left_out or {"pixel_values", "input_ids"} <= names:
        return subject
    name, misfit = next(iter(run.left_out.items()))
    reason = f"{len(run.left_out)} of the probes were left out, first {name}: {misfit}"
    return replace(subject, verdict=Verdict.INCONCLUSIVE, reason=reason)


@dataclass(frozen=True, slots=True)
class _Floors:
    """What nobody can help, over all positions or at some."""

    runs: GraphRuns
    reference: ReferenceRun
    dtype: str

    def tolerances(self, kept: Mapping[str, Tensor] | None = None) -> dict[str, Tolerance]:
        """Add up shares, by output; ``kept`` says at which positions, by probe."""
        merge = merge_share([self._at(run, kept) for run in self.reference.roundings], self.dtype)
        export = self._export(kept)
        return {
            output: Tolerance(output=output, shares=(share, export[output]))
            for output, share in merge.items()
            if output in export
        }

    def limits(self) -> dict[str, float]:
        """How far the base's own graph may be from the base, by output; empty where there is none."""
        if self.runs.base is None:
            return {}
        dtype = self.runs.base.dtype
        return {entry.output: export_limit(entry.mean, dtype) for entry in self.reference.arithmetic}

    def fault_of_base(self) -> str | None:
        """Say which output of the base's own graph is not the base's: a floor may be no excuse for a wrong graph."""
        shares = self._export(None)
        for output, limit in self.limits().items():
            if output in shares and not shares[output].mean <= limit:
                return (
                    f"{output}: the base's own graph is not the base: its divergence is {shares[output].mean:.2g}, "
                    f"where {limit:.2g} is what arithmetic could explain"
                )
        return None

    def _export(self, kept: Mapping[str, Tensor] | None) -> dict[str, Share]:
        if self.runs.base is not None:
            base = self.runs.base
            found = compare_outputs(self.reference.stored_base[base.dtype], base.prefill)
            source = "the base's graph against the base in torch, at the same stored weights"
            return single_share("export", join(self._at(found, kept)), source)
        return single_share("arithmetic", self.reference.arithmetic, "the base in float32 against float64")

    def _at(self, parts: Divergences, kept: Mapping[str, Tensor] | None) -> Divergences:
        return parts if kept is None else at_positions(parts, kept)


def _by_batch(run: OnnxRun, probes: Sequence[Probe]) -> dict[str, list[str]]:
    """Sort the probes that were decoded by how many rows they have and where these are padded."""
    found: dict[str, list[str]] = {}
    for probe in probes:
        if probe.name in run.decode:
            padding = run.padding[probe.name]
            title = f"batch {len(probe.tokens)}" + (f", {padding}-padded" if padding else "")
            found.setdefault(title, []).append(probe.name)
    return found


def _softened(subject: SubjectReport, problem: str) -> SubjectReport:
    if subject.verdict is not Verdict.FAIL:
        return subject
    why = problem or "there is no graph of the base"
    reason = f"{subject.reason}; what 16-bit arithmetic alone does is unknown, because {why}"
    return replace(subject, verdict=Verdict.INCONCLUSIVE, reason=reason)
