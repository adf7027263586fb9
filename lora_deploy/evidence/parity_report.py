"""What a comparison of outputs found: figures, where they come from, and a verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lora_deploy.evidence.divergence import Divergence
from lora_deploy.evidence.magnitude import RangeReport
from lora_deploy.evidence.quantised_report import QuantisedReport
from lora_deploy.evidence.tolerance import Power, Tolerance
from lora_deploy.evidence.verdict import Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Greedy:
    """A greedy continuation beside the reference's."""

    probe: str
    n_tokens: int
    first_difference: int | None
    """Step at which another token was chosen first, from 0."""
    margin: float | None
    """How far the reference's best token led its second there, in logits."""
    allowed: float
    """A lead up to this may turn: ten times the largest difference that rounding makes to any logit."""

    @property
    def verdict(self) -> Verdict:
        """A difference at a clear lead is none of rounding."""
        is_wrong = self.margin is not None and not self.margin <= self.allowed
        return Verdict.FAIL if is_wrong else Verdict.PASS


@dataclass(frozen=True, slots=True, kw_only=True)
class SubjectReport:
    """One thing compared with the unmerged reference."""

    name: str
    verdict: Verdict
    reason: str
    """Why it does not pass; empty when it does."""
    tolerances: tuple[Tolerance, ...] = ()
    overall: tuple[Divergence, ...] = ()
    """By output, over all probes."""
    by_probe: Mapping[str, Divergence]
    """By ``probe/output``, with every position."""
    greedy: tuple[Greedy, ...] = ()
    facts: Mapping[str, Any]
    """Seconds, memory, provider, nodes that fell back …"""

    def to_json(self) -> dict[str, Any]:
        """Give every figure; positions by probe."""
        overall = [{key: v for key, v in entry.to_json().items() if not isinstance(v, list)} for entry in self.overall]
        return {
            "name": self.name,
            "verdict": self.verdict.value,
            "reason": self.reason,
            "outputs": overall,
            "tolerances": [tolerance.to_json() for tolerance in self.tolerances],
            "greedy": [asdict(entry) | {"verdict": entry.verdict.value} for entry in self.greedy],
            "probes": {name: entry.to_json() for name, entry in self.by_probe.items()},
            **self.facts,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """What a pipeline drew at its end, beside what the unmerged one drew."""

    name: str
    """``base``, ``unmerged``, ``merged`` or ``onnx``."""
    relative_l2: float | None
    """‖difference from the unmerged picture‖ / ‖that picture‖; None where there is none."""
    cosine: float | None
    png: str
    """The picture as PNG, in base64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityReport:
    """The unmerged model against everything that was made of it."""

    verdict: Verdict
    reason: str = ""
    """Why it does not pass, or why nothing was measured."""
    hint: str = ""
    reference: str = ""
    """Who built the unmerged model; says so where it shares our reader."""
    way: str = "whole model"
    """``whole model``, or ``layer by layer`` where that did not fit into memory."""
    is_independent: bool = False
    dtype: str = ""
    """Format that most adapted weights are stored in."""
    subjects: tuple[SubjectReport, ...] = ()
    quantised: tuple[QuantisedReport, ...] = ()
    """Exports that no tolerance of rounding holds for."""
    power: tuple[Power, ...] = ()
    effect: tuple[Divergence, ...] = ()
    """Unmerged against base: what the adapter does."""
    magnitudes: RangeReport | None = None
    pictures: tuple[Picture, ...] = ()
    """Of a pipeline: same prompt, same seed."""
    probes: Mapping[str, str]
    """Shapes, by name."""
    seed: int = 0
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    versions: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """The report for ``evidence.json``."""
        effect = [{key: v for key, v in entry.to_json().items() if not isinstance(v, list)} for entry in self.effect]
        return {
            "verdict": self.verdict.value,
            "reason": self.reason,
            "hint": self.hint,
            "units": "kl in nats; distances relative to the reference; others in the output's own unit",
            "reference": self.reference,
            "way": self.way,
            "is_independent": self.is_independent,
            "dtype": self.dtype,
            "power": [entry.to_json() for entry in self.power],
            "effect": effect,
            "subjects": [subject.to_json() for subject in self.subjects],
            "quantised": [entry.to_json() for entry in self.quantised],
            "float16_range": self.magnitudes.to_json() if self.magnitudes else None,
            **({"pictures": [asdict(picture) for picture in self.pictures]} if self.pictures else {}),
            "probes": dict(self.probes),
            "seed": self.seed,
            "notes": list(self.notes),
            "seconds": self.seconds,
            "versions": dict(self.versions),
        }
