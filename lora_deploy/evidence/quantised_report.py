"""What quantisation costs beside what the adapter does: figures, and a verdict.

A quantised graph is no copy of the unmerged model, so no tolerance that rounding sets can hold for it. Its loss is
split into what merging, exporting and quantising do, and judged by what the adapter is for:

- *destroyed*: quantising must not move the outputs further than the adapter did. Mean KL(float graph ‖ quantised graph)
  above mean KL(unmerged ‖ base) fails.
- *lost*: at least ``LEAST_SHARE`` of the adapter's change must be in the quantised model, or it fails. The share is the
  component of (quantised merged - quantised base) along (unmerged - base). Noise, which has no direction, leaves it
  near 1; a model that is the base gives 0.
- *suspicious*: quantising should cost the merged model about what it costs the base. More than ``SUSPICIOUS`` times as
  much, and more than ``HARMLESS`` of the adapter's effect, is inconclusive: the bytes may be right, but the merge made
  weights that this format does not suit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lora_deploy.evidence.divergence import Divergence
from lora_deploy.evidence.survival import Survival
from lora_deploy.evidence.verdict import Verdict

LEAST_SHARE = 0.5
SUSPICIOUS = 4.0
HARMLESS = 0.1
"""A strong adapter may well make weights that lose many times what the base's do, and still next to nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """What became of one output, in one way of running the graphs."""

    run: str
    """``whole texts``, or ``over a cache``."""
    output: str
    merge: Divergence
    """Merged checkpoint, from unmerged."""
    export: Divergence
    """Float graph, from the merged checkpoint."""
    quantise: Divergence
    """Quantised graph, from the float graph."""
    whole: Divergence
    """Quantised graph, from unmerged."""
    base: Divergence
    """The base's quantised graph, from its float graph."""
    effect: Divergence
    """Base, from unmerged: what the adapter does."""
    survival: Survival

    @property
    def verdict(self) -> tuple[Verdict, str]:
        """Judge it, and say why it does not pass."""
        said = f"{self.run}, {self.output}: "
        if not self.quantise.mean <= self.effect.mean:
            reason = f"quantising moves the outputs by {self.quantise.mean:.2g}, the adapter by {self.effect.mean:.2g}"
            return Verdict.FAIL, said + reason
        if not self.survival.share >= LEAST_SHARE:
            reason = f"{self.survival.share:.0%} of the adapter's change is left, at least {LEAST_SHARE:.0%} is needed"
            return Verdict.FAIL, said + reason
        if not self.quantise.mean <= max(SUSPICIOUS * self.base.mean, HARMLESS * self.effect.mean):
            reason = (
                f"quantising costs the merged model {self.quantise.mean:.2g}, the base only {self.base.mean:.2g}: "
                f"more than {SUSPICIOUS:g} times as much"
            )
            return Verdict.INCONCLUSIVE, said + reason
        return Verdict.PASS, ""

    def to_json(self) -> dict[str, Any]:
        """Give every figure but positions."""
        parts = ("merge", "export", "quantise", "whole", "base", "effect")
        figures = {part: _figures(getattr(self, part)) for part in parts}
        verdict, reason = self.verdict
        survival = asdict(self.survival) | {"share": self.survival.share}
        limits = {"least_share": LEAST_SHARE, "suspicious": SUSPICIOUS, "harmless": HARMLESS}
        judged = {"verdict": verdict.value, "reason": reason, "limits": limits}
        return {"run": self.run, "output": self.output, **judged, **figures, "survival": survival}


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantisedReport:
    """One quantised export beside everything."""

    name: str
    """Its folder."""
    verdict: Verdict
    reason: str = ""
    losses: tuple[Loss, ...] = ()
    n_bytes: Mapping[str, int]
    """Of graphs and weights: ``quantised``, and ``plain`` where there are such."""

    def to_json(self) -> dict[str, Any]:
        """The report for ``evidence.json``."""
        return {
            "name": self.name,
            "verdict": self.verdict.value,
            "reason": self.reason,
            "losses": [loss.to_json() for loss in self.losses],
            "n_bytes": dict(self.n_bytes),
        }


def judged(name: str, losses: tuple[Loss, ...], n_bytes: Mapping[str, int]) -> QuantisedReport:
    """Sum up: the gravest loss speaks."""
    found = [loss.verdict for loss in losses]
    for verdict in (Verdict.FAIL, Verdict.INCONCLUSIVE):
        reasons = [reason for entry, reason in found if entry is verdict]
        if reasons:
            return QuantisedReport(
                name=name, verdict=verdict, reason="; ".join(reasons), losses=losses, n_bytes=n_bytes
            )
    if not losses:
        reason = "its graphs give no output that could be compared"
        return QuantisedReport(name=name, verdict=Verdict.INCONCLUSIVE, reason=reason, n_bytes=n_bytes)
    return QuantisedReport(name=name, verdict=Verdict.PASS, losses=losses, n_bytes=n_bytes)


def _figures(found: Divergence) -> dict[str, Any]:
    return {key: value for key, value in found.to_json().items() if not isinstance(value, list)}
