"""Are two times equal? The statistics of it: no clock, no graphs, only numbers.

The unit is the logarithm of a ratio, one for each fresh pair of sessions: within one pair, runs repeat each other, and
byte-identical graphs differ "significantly" by 1.5 % (measured). Over pairs the mean has a t-interval. Two one-sided
tests (TOST): *equal* when the interval lies within the bound, *different* when it lies outside it, else neither.

There are three looks, at 6, 12 and 24 pairs, so that clear cases end early. Each look may err, so each gets a third of
the error rate (Bonferroni): over all looks, a ratio at or beyond the bound is called equal with probability at most
5 %, and one within it different with at most 5 %. Several phases (reading a text, continuing it) must all be equal,
which needs no correction; any of them may be different, which does, and each gets its part.

Promise: the same numbers give the same verdict; nothing is looked at but the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import cache
from statistics import fmean, stdev
from typing import Any

LOOKS = (6, 12, 24)
"""Numbers of pairs after which is judged."""
ERROR_RATE = 0.05
"""Of all looks together, one-sided."""
FEWEST = 3
"""Pairs below which nothing is said, even when time runs out."""


class Equivalence(StrEnum):
    """What times show."""

    EQUAL = "equal"
    DIFFERENT = "different"
    INCONCLUSIVE = "inconclusive"


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """Where the mean of a sample of log ratios lies, as ratios."""

    n: int
    ratio: float
    """Geometric mean."""
    low: float
    high: float
    error_rate: float
    """Of each end."""
    spread: float
    """Standard deviation of the log ratios."""

    def lies_within(self, bound: float) -> bool:
        """Whether every ratio of the interval is within 1 ± bound (from 1/(1 + bound) to 1 + bound)."""
        return 1 / (1 + bound) < self.low and self.high < 1 + bound

    def lies_outside(self, bound: float) -> bool:
        """Whether no ratio of the interval is."""
        return self.low > 1 + bound or self.high < 1 / (1 + bound)


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """One judgement."""

    n_pairs: int
    verdict: Equivalence
    intervals: Mapping[str, Interval]
    """By phase, at the level that decides equality."""

    def to_json(self) -> dict[str, Any]:
        """Give plain values."""
        intervals = {phase: asdict(interval) for phase, interval in self.intervals.items()}
        return {"n_pairs": self.n_pairs, "verdict": self.verdict.value, "intervals": intervals}


def look(samples: Mapping[str, Sequence[float]], bound: float) -> Look:
    """Judge log ratios, by phase: each a sample of the same pairs."""
    n = min(len(sample) for sample in samples.values())
    if n < FEWEST:
        return Look(n_pairs=n, verdict=Equivalence.INCONCLUSIVE, intervals={})
    rate = ERROR_RATE / len(LOOKS)
    intervals = {phase: interval(sample, rate) for phase, sample in samples.items()}
    if any(interval(sample, rate / len(samples)).lies_outside(bound) for sample in samples.values()):
        verdict = Equivalence.DIFFERENT
    elif all(found.lies_within(bound) for found in intervals.values()):
        verdict = Equivalence.EQUAL
    else:
        verdict = Equivalence.INCONCLUSIVE
    return Look(n_pairs=n, verdict=verdict, intervals=intervals)


def interval(sample: Sequence[float], error_rate: float) -> Interval:
    """The t-interval of a sample's mean; each end errs with the given rate. At least two values."""
    n = len(sample)
    mean, spread = fmean(sample), stdev(sample)
    half = student_t(1 - error_rate, n - 1) * spread / math.sqrt(n)
    return Interval(
        n=n,
        ratio=math.exp(mean),
        low=math.exp(mean - half),
        high=math.exp(mean + half),
        error_rate=error_rate,
        spread=spread,
    )


@cache
def student_t(probability: float, degrees: int) -> float:
    """Quantile of Student's t: what a t with so many degrees of freedom is below, with this probability.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4, inverted by bisection.
    """
    if probability < 0.5:
        return -student_t(1 - probability, degrees)
    low, high = 0.0, 1.0
    while _cumulative(high, degrees) < probability:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        if middle in {low, high}:
            break
        low, high = (middle, high) if _cumulative(middle, degrees) < probability else (low, middle)
    return (low + high) / 2


def _cumulative(t: float, degrees: int) -> float:
    """Probability of a value up to t >= 0: a finite sum for whole degrees of freedom."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    if degrees % 2:
        term, total = cosine, 0.0
        for k in range(1, (degrees - 1) // 2 + 1):
            total += term
            term *= cosine**2 * (2 * k) / (2 * k + 1)
        central = 2 / math.pi * (angle + sine * total)
    else:
        term, total = 1.0, 0.0
        for k in range(1, degrees // 2 + 1):
            total += term
            term *= cosine**2 * (2 * k - 1) / (2 * k)
        central = sine * total
    return (1 + central) / 2
