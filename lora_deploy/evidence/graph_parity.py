"""The merged model's graphs beside the unmerged model: whole texts, decoding over a cache, greedy tokens.

The export share comes from the base's own graph beside the base in torch, at the same stored weights. Without one it is
what float32 arithmetic itself leaves open, the base in float32 beside float64; that is no measure for graphs that
compute in 16 bits, where exceeding it is inconclusive, not a failure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from lora_deploy.errors import EvidenceError, InconclusiveError
from lora_deploy.evidence.divergence import compare_outputs, join
from lora_deploy.evidence.forward import LOGITS, Outputs
from lora_deploy.evidence.graphs import GraphFolder
from lora_deploy.evidence.onnx_subject import OnnxRun, run_graphs
from lora_deploy.evidence.parity_report import SubjectReport
from lora_deploy.evidence.probe import Probe
from lora_deploy.evidence.reference_run import ReferenceRun
from lora_deploy.evidence.subject import compare_subject
from lora_deploy.evidence.tolerance import Share, Tolerance, single_share
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
    runs: GraphRuns, probes: Sequence[Probe], reference: ReferenceRun, merge: Mapping[str, Share]
) -> tuple[SubjectReport, ...]:
    """Judge what the graphs gave."""
    run = runs.merged
    if isinstance(run, SubjectReport):
        return (run,)
    export = _export_share(runs, reference)
    tolerances = {
        output: Tolerance(output=output, shares=(share, export[output]))
        for output, share in merge.items()
        if output in export
    }
    found = [compare_subject("onnx prefill", run.prefill, reference.outputs, tolerances, run.facts)]
    for title, names in _by_batch(run, probes).items():
        rows = {name: run.decode[name] for name in names}
        expected: Outputs = {
            name: {LOGITS: reference.outputs[name][LOGITS][run.decoding[name].is_decoded]} for name in names
        }
        found.append(compare_subject(f"onnx decode over a cache, {title}", rows, expected, tolerances, {}))
    if run.greedy:
        found.append(compare_subject("onnx greedy", run.greedy, reference.outputs, tolerances, {}))
    if runs.base is None and run.dtype is not torch.float32:
        return tuple(_softened(subject, runs.base_problem) for subject in found)
    return tuple(found)


def _by_batch(run: OnnxRun, probes: Sequence[Probe]) -> dict[str, list[str]]:
    """Sort the probes that were decoded by how many rows they have and where these are padded."""
    found: dict[str, list[str]] = {}
    for probe in probes:
        if probe.name in run.decode:
            padding = run.padding[probe.name]
            title = f"batch {len(probe.tokens)}" + (f", {padding}-padded" if padding else "")
            found.setdefault(title, []).append(probe.name)
    return found


def _export_share(runs: GraphRuns, reference: ReferenceRun) -> dict[str, Share]:
    if runs.base is not None:
        found = join(compare_outputs(reference.base[runs.base.dtype], runs.base.prefill))
        source = "the base's graph against the base in torch, at the same stored weights"
        return single_share("export", found, source)
    return single_share("arithmetic", reference.arithmetic, "the base in float32 against float64")


def _softened(subject: SubjectReport, problem: str) -> SubjectReport:
    if subject.verdict is not Verdict.FAIL:
        return subject
    why = problem or "there is no graph of the base"
    reason = f"{subject.reason}; what 16-bit arithmetic alone does is unknown, because {why}"
    return replace(subject, verdict=Verdict.INCONCLUSIVE, reason=reason)
