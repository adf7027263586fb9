"""Judge one subject by its outputs beside the reference's."""

from __future__ import annotations

from collections.abc import Mapping

from lora_deploy.errors import EvidenceError
from lora_deploy.evidence.divergence import compare_outputs, join
from lora_deploy.evidence.forward import LOGITS, MARGINS, TOKENS, Outputs
from lora_deploy.evidence.parity_report import Greedy, SubjectReport
from lora_deploy.evidence.tolerance import Tolerance
from lora_deploy.evidence.verdict import Verdict


def compare_subject(
    name: str,
    outputs: Outputs,
    reference: Outputs,
    tolerances: Mapping[str, Tolerance],
    facts: Mapping[str, object],
) -> SubjectReport:
    """Judge a subject's outputs: every output within its tolerance, no greedy token turned at a clear lead."""
    try:
        by_probe = compare_outputs(reference, outputs)
    except EvidenceError as error:
        return SubjectReport(name=name, verdict=Verdict.FAIL, reason=error.message, by_probe={}, facts=facts)
    overall = join(by_probe)
    greedy = _greedy(outputs, reference, tolerances)
    reasons = [
        f"{entry.output}: {entry.measure} is {entry.mean:.2g} on average and {entry.largest:.2g} at most, "
        f"allowed are {bound.mean:.2g} and {bound.largest:.2g}"
        for entry in overall
        if not (bound := tolerances[entry.output]).allows(entry)
    ]
    reasons += [
        f"{entry.probe}: greedy token {entry.first_difference} is another, at a lead of {entry.margin:.2g}"
        for entry in greedy
        if entry.verdict is Verdict.FAIL
    ]
    return SubjectReport(
        name=name,
        verdict=Verdict.FAIL if reasons else Verdict.PASS if overall or greedy else Verdict.INCONCLUSIVE,
        reason="; ".join(reasons) if reasons or overall or greedy else "gives no output that could be compared",
        tolerances=tuple(tolerances[entry.output] for entry in overall),
        overall=overall,
        by_probe=by_probe,
        greedy=greedy,
        facts=facts,
    )


def _greedy(outputs: Outputs, reference: Outputs, tolerances: Mapping[str, Tolerance]) -> tuple[Greedy, ...]:
    found = []
    for probe, values in outputs.items():
        if TOKENS not in values or TOKENS not in reference[probe]:
            continue
        expected, tokens = reference[probe][TOKENS], values[TOKENS]
        different = (expected[: len(tokens)] != tokens).nonzero()
        first = int(different[0]) if len(different) else None
        margin = float(reference[probe][MARGINS][first]) if first is not None else None
        found.append(
            Greedy(
                probe=probe,
                n_tokens=len(tokens),
                first_difference=first,
                margin=margin,
                allowed=tolerances[LOGITS].clear_lead,
            )
        )
    return tuple(found)
