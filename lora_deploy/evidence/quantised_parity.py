"""Quantised graphs beside the unmerged model, the merged one, the float graphs, and the same four of the base."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lora_deploy.errors import EvidenceError
from lora_deploy.evidence.divergence import Divergence, compare_outputs, join
from lora_deploy.evidence.forward import LOGITS, Outputs
from lora_deploy.evidence.graph_parity import GraphRuns, Graphs, run_all
from lora_deploy.evidence.onnx_subject import OnnxRun
from lora_deploy.evidence.parity_report import SubjectReport
from lora_deploy.evidence.probe import Probe
from lora_deploy.evidence.quantised_graphs import QuantisedGraphs
from lora_deploy.evidence.quantised_report import Loss, QuantisedReport, judged
from lora_deploy.evidence.reference_run import ReferenceRun
from lora_deploy.evidence.survival import survivals
from lora_deploy.evidence.verdict import Verdict

WHOLE, OVER_CACHE = "whole texts", "over a cache"


def run_quantised(graphs: QuantisedGraphs, probes: Sequence[Probe]) -> GraphRuns:
    """Run quantised graphs, of merged model and base.

    Raises:
        RecipeError: No provider has that name.
    """
    return run_all(graphs.quantised, probes, only_prefill_base=False)


def quantised_report(
    graphs: QuantisedGraphs,
    runs: GraphRuns,
    plain: GraphRuns | None,
    reference: ReferenceRun,
    reloaded: Outputs | None,
) -> QuantisedReport:
    """Split a quantised export's loss into shares, and judge it; ``reloaded`` are the merged checkpoint's outputs."""
    n_bytes = _sizes(graphs.quantised, graphs.plain)
    if isinstance(runs.merged, SubjectReport):
        return QuantisedReport(
            name=graphs.name, verdict=runs.merged.verdict, reason=runs.merged.reason, n_bytes=n_bytes
        )
    sides = _sides(runs, plain, reference, reloaded)
    if sides is None:
        reason = graphs.problem or _problem(runs, plain) or "the merged checkpoint could not be run"
        return QuantisedReport(name=graphs.name, verdict=Verdict.INCONCLUSIVE, reason=reason, n_bytes=n_bytes)
    try:
        return judged(graphs.name, tuple(_losses(sides)), n_bytes)
    except EvidenceError as error:
        return QuantisedReport(name=graphs.name, verdict=Verdict.FAIL, reason=error.message, n_bytes=n_bytes)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Sides:
    """Outputs of everything that is compared."""

    unmerged: Outputs
    base: Outputs
    merged: Outputs
    graph: OnnxRun
    quantised: OnnxRun
    base_graph: OnnxRun
    quantised_base: OnnxRun


def _sides(
    runs: GraphRuns, plain: GraphRuns | None, reference: ReferenceRun, reloaded: Outputs | None
) -> _Sides | None:
    if plain is None or plain.base is None or runs.base is None or reloaded is None:
        return None
    if isinstance(plain.merged, SubjectReport) or isinstance(runs.merged, SubjectReport):
        return None
    return _Sides(
        unmerged=reference.outputs,
        base=reference.base,
        merged=reloaded,
        graph=plain.merged,
        quantised=runs.merged,
        base_graph=plain.base,
        quantised_base=runs.base,
    )


def _problem(runs: GraphRuns, plain: GraphRuns | None) -> str:
    found = [runs.base_problem]
    if plain is not None:
        found += [plain.base_problem, plain.merged.reason if isinstance(plain.merged, SubjectReport) else ""]
    return "; ".join(reason for reason in found if reason)


def _losses(sides: _Sides) -> Iterator[Loss]:
    yield from _losses_of(
        WHOLE,
        (sides.unmerged, sides.base, sides.merged),
        (sides.graph.prefill, sides.quantised.prefill, sides.base_graph.prefill, sides.quantised_base.prefill),
    )
    decoding = sides.quantised.decoding

    def decoded(outputs: Outputs) -> Outputs:
        return {name: {LOGITS: outputs[name][LOGITS][cut.is_decoded]} for name, cut in decoding.items()}

    yield from _losses_of(
        OVER_CACHE,
        (decoded(sides.unmerged), decoded(sides.base), decoded(sides.merged)),
        (sides.graph.decode, sides.quantised.decode, sides.base_graph.decode, sides.quantised_base.decode),
    )


def _losses_of(
    run: str, torch_sides: tuple[Outputs, Outputs, Outputs], graph_sides: tuple[Outputs, Outputs, Outputs, Outputs]
) -> Iterator[Loss]:
    """Compare every output that the quantised graph gives, on the probes that it takes."""
    graph, quantised, base_graph, quantised_base = graph_sides
    unmerged, base, merged = ({probe: side[probe] for probe in quantised} for side in torch_sides)
    pairs = {
        "merge": _compared(unmerged, merged),
        "export": _compared(merged, graph),
        "quantise": _compared(graph, quantised),
        "whole": _compared(unmerged, quantised),
        "base": _compared(base_graph, quantised_base),
        "effect": _compared(unmerged, base),
    }
    for output, survival in survivals(unmerged, base, quantised, quantised_base).items():
        if all(output in found for found in pairs.values()):
            shares = {name: found[output] for name, found in pairs.items()}
            yield Loss(run=run, output=output, survival=survival, **shares)


def _compared(reference: Outputs, subject: Outputs) -> dict[str, Divergence]:
    return {entry.output: entry for entry in join(compare_outputs(reference, subject))}


def _sizes(quantised: Graphs, plain: Graphs | None) -> dict[str, int]:
    sizes = {"quantised": quantised.merged.n_bytes}
    return sizes | ({"plain": plain.merged.n_bytes} if plain is not None else {})
