"""The gate: what evidence lets through.

Promise: what failed is never released. What is missing, or cannot tell, needs a person who accepts it by its code and
says why; that is written down. Evidence counts only for the very files that it was measured on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_deploy.checkpoint import read_json
from lora_deploy.errors import InconclusiveError, RecipeError, ReleaseError
from lora_deploy.evidence.dossier import EVIDENCE_NAME
from lora_deploy.evidence.verdict import Check, Verdict
from lora_deploy.release.options import Acceptance

MISSING = "missing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """Evidence that a release lacks."""

    code: str
    """Such as ``parity-inconclusive``: what ``--accept`` names."""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """What the gate let through, and on whose word."""

    verdicts: Mapping[str, str]
    accepted: tuple[Acceptance, ...]


def read_evidence(folder: Path) -> dict[str, Any] | None:
    """Read ``evidence.json``; None where there is none."""
    path = folder / EVIDENCE_NAME
    return read_json(path) if path.is_file() else None


def pass_gate(
    evidence: Mapping[str, Any] | None,
    files: Mapping[str, str],
    accepted: Sequence[Acceptance],
    *,
    has_graphs: bool,
) -> Passage:
    """Let a release through, or say what it lacks; ``files`` are the sha256 of weights and graphs by path.

    Raises:
        ReleaseError: A check failed.
        InconclusiveError: A check is missing or cannot tell, and nobody accepted that.
        RecipeError: Something is accepted that is not in the way, or without a reason.
    """
    verdicts = {
        check.value: _verdict(evidence, files, check) for check in Check if check is not Check.LATENCY or has_graphs
    }
    for check, (verdict, reason) in verdicts.items():
        if verdict == Verdict.FAIL:
            raise ReleaseError(
                f"{check} failed: {reason}", hint="what failed is never released", code=f"{check}-failed"
            )
    gaps = [Gap(code=f"{c}-{v}", reason=reason) for c, (v, reason) in verdicts.items() if v != Verdict.PASS]
    _require_accepted(gaps, accepted)
    return Passage(verdicts={c: verdict for c, (verdict, _) in verdicts.items()}, accepted=tuple(accepted))


def _verdict(evidence: Mapping[str, Any] | None, files: Mapping[str, str], check: Check) -> tuple[str, str]:
    if evidence is None:
        return MISSING, f"there is no {EVIDENCE_NAME}: run lora-deploy verify"
    checked = evidence.get("files")
    stale = sorted(p for p, sha256 in files.items() if not isinstance(checked, Mapping) or checked.get(p) != sha256)
    if stale:
        return MISSING, f"{EVIDENCE_NAME} is not about {stale[0]} as it is now: run lora-deploy verify"
    report = evidence.get(check.value)
    verdict = report.get("verdict") if isinstance(report, Mapping) else None
    reason = str(report.get("reason", "")) if isinstance(report, Mapping) else ""
    known = {found.value for found in Verdict}
    return (str(verdict), reason) if verdict in known else (MISSING, reason or f"{check} was not made")


def _require_accepted(gaps: Sequence[Gap], accepted: Sequence[Acceptance]) -> None:
    codes = [gap.code for gap in gaps]
    for acceptance in accepted:
        if not acceptance.because.strip():
            raise RecipeError(f"--accept {acceptance.code}: gives no reason", hint='--because "…"')
        if acceptance.code not in codes:
            expected = ", ".join(codes) or "nothing: every check passed"
            raise RecipeError(f"--accept {acceptance.code}: is not in the way; found {expected}")
    open_gaps = [gap for gap in gaps if gap.code not in {acceptance.code for acceptance in accepted}]
    if open_gaps:
        reasons = "; ".join(f"{gap.code}: {gap.reason}" for gap in open_gaps)
        options = " ".join(f'--accept {gap.code} --because "…"' for gap in open_gaps)
        raise InconclusiveError(
            f"not proven: {reasons}", hint=f"prove it, or take it upon you: {options}", code=open_gaps[0].code
        )
