"""How far a correct subject may be from the reference, and whether that is small enough to see a wrong one.

The tolerance is measured, not chosen. Two floors are added: the merge share, what rounding every weight once to the
stored format does to the outputs (rounded by chance, three seeds, the largest counts); and, for graphs, the export
share, what the same weights give in the graph and in torch. A subject passes when its mean divergence is within
``MULTIPLE`` times the floors' mean, and its worst position within ``WORST_MULTIPLE`` times their worst.

Why 6 and 16: divergences grow with the square of an error, so this allows 2.4 times the floor's error on average, and 4
times at the one worst of some 150 positions, which varies by as much from seed to seed. Rounding to nearest has half
the squared error of rounding by chance: right merges of ours lie at 0.04 to 0.15 of the tolerance, PEFT's own, which
may round factors, product and sum separately, at up to 0.36 (36 merges of tiny models, in all its modes and formats).

Power: the adapter's own effect, unmerged against base, must be ``POWER`` times the tolerance. Else a missing adapter
would pass, or nearly so, and the result is inconclusive, whatever was measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lora_deploy.evidence.divergence import Divergence, Divergences, join

MULTIPLE = 6.0
WORST_MULTIPLE = 16.0
POWER = 10.0
N_SEEDS = 3
EXPORT_MULTIPLE = 1e3
"""How far a base's graph may be from the base: so many times the divergence of its arithmetic, 30 times the error."""
CLEAR_LEAD = 10.0
"""A greedy choice may turn where it leads by at most this many times the largest difference that the floors show."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one unavoidable cause does to an output."""

    name: str
    mean: float
    """Mean divergence."""
    largest: float
    """Divergence of the worst position."""
    max_abs: float
    """Largest difference of any value: what greedy choices may turn on."""
    source: str
    """How it was measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """Bounds of one output's divergence."""

    output: str
    shares: tuple[Share, ...]

    @property
    def mean(self) -> float:
        """Largest mean divergence that passes."""
        return MULTIPLE * sum(share.mean for share in self.shares)

    @property
    def largest(self) -> float:
        """Largest divergence of any position that passes."""
        return WORST_MULTIPLE * sum(share.largest for share in self.shares)

    @property
    def clear_lead(self) -> float:
        """Lead beyond which the best of several classes stays the best."""
        return CLEAR_LEAD * sum(share.max_abs for share in self.shares)

    def allows(self, found: Divergence) -> bool:
        """Whether a subject's output is near enough."""
        return found.mean <= self.mean and found.largest <= self.largest

    @property
    def reason(self) -> str:
        """Say where it comes from."""
        parts = " + ".join(f"{share.name} {share.mean:.2g}" for share in self.shares)
        return f"{MULTIPLE:g} x ({parts})"

    def to_json(self) -> dict[str, Any]:
        """Give plain values."""
        return {
            "output": self.output,
            "mean": self.mean,
            "largest": self.largest,
            "multiple": MULTIPLE,
            "worst_multiple": WORST_MULTIPLE,
            "reason": self.reason,
            "shares": [asdict(share) for share in self.shares],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Power:
    """Whether a fault could have been seen in one output."""

    output: str
    effect: float
    """Mean divergence of the unmerged model from the base: what the adapter does."""
    tolerance: float

    @property
    def ratio(self) -> float:
        """Effect by tolerance."""
        if self.tolerance:
            return self.effect / self.tolerance
        return math.inf if self.effect else 0.0

    @property
    def is_enough(self) -> bool:
        """Whether a missing adapter would have failed by far."""
        return self.ratio >= POWER

    @property
    def smallest_visible(self) -> float:
        """The part of the adapter's effect that a fault must have to show, [0..1] where there is power."""
        return math.sqrt(1 / self.ratio) if self.ratio else math.inf

    def to_json(self) -> dict[str, Any]:
        """Give plain values."""
        return {
            "output": self.output,
            "effect": self.effect,
            "ratio": self.ratio,
            "needed": POWER,
            "is_enough": self.is_enough,
            "smallest_visible": self.smallest_visible,
        }


def merge_share(runs: Sequence[Divergences], dtype: str) -> dict[str, Share]:
    """Take the largest of several roundings by chance, by output; each run is by ``probe/output``."""
    found: dict[str, Share] = {}
    for run in runs:
        for divergence in join(run):
            before = found.get(divergence.output)
            found[divergence.output] = Share(
                name="merge",
                mean=max(divergence.mean, before.mean if before else 0.0),
                largest=max(divergence.largest, before.largest if before else 0.0),
                max_abs=max(divergence.max_abs, before.max_abs if before else 0.0),
                source=f"unmerged against weights rounded by chance to {dtype}, {len(runs)} seeds",
            )
    return found


def export_limit(arithmetic: float, dtype: torch.dtype) -> float:
    """Bound the export share's mean: what float32 leaves open, for coarser formats by the square of their rounding.

    Kernels add in other orders and take other functions for an exponential, which costs a few digits; a graph that
    computes something else is off by many orders of magnitude more.
    """
    float32 = torch.finfo(torch.float32).eps
    coarser = (torch.finfo(dtype).eps / float32) ** 2
    return EXPORT_MULTIPLE * max(arithmetic, float32**2) * max(coarser, 1.0)


def single_share(name: str, run: Sequence[Divergence], source: str) -> dict[str, Share]:
    """Take one comparison as a share, by output."""
    return {
        entry.output: Share(name=name, mean=entry.mean, largest=entry.largest, max_abs=entry.max_abs, source=source)
        for entry in run
    }
