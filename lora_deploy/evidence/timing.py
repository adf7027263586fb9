"""Take times of several models side by side, in fresh pairs of sessions.

For every pair all sides are loaded anew, in random order, and warmed up; then come rounds, each of them running every
side once in random order. A pair's figure is the median over its rounds of the logarithm of the ratio to the base: what
happens to one round (another process, a clock that changes) happens to both sides. Two clocks run: the process's CPU
time, which a neighbour hardly touches, decides; wall time is told.

Promise: seeded; no more time than given, but for the pair that is under way; nothing is left loaded.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Protocol

from lora_deploy.evidence.equivalence import FEWEST, LOOKS, Equivalence, Look, look

BASE, MERGED, AGAIN = "base", "merged", "base again"
CPU, WALL = "cpu", "wall"
_MIN_ROUNDS, _MAX_ROUNDS = 5, 40
_HOPED_PAIRS = 12
"""So many pairs should fit the time."""


@dataclass(frozen=True, slots=True)
class Times:
    """One run, in seconds."""

    cpu: float
    wall: float
    """By the clock of a CUDA device where that is what runs."""


class Side(Protocol):
    """A loaded model whose phases can be timed."""

    @property
    def phases(self) -> tuple[str, ...]:
        """What it can do, such as ``prefill`` and ``decode``."""
        ...

    def run(self, phase: str) -> Times:
        """Do it once."""
        ...


Load = Callable[[], Side]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One set of fresh sessions."""

    order: tuple[str, ...]
    """In which the sides were loaded."""
    log_ratios: Mapping[str, Mapping[str, Mapping[str, float]]]
    """By side, clock and phase: median log ratio to the base."""
    medians: Mapping[str, Mapping[str, float]]
    """By side and phase: median seconds, CPU."""


@dataclass(slots=True, kw_only=True)
class Measurement:
    """All pairs, and what was concluded at each look."""

    seed: int
    bound: float
    clock: str = CPU
    """The clock that decides."""
    n_rounds: int = 0
    pairs: list[Pair] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)
    seconds: float = 0.0
    ran_out: bool = False
    """Whether time ended before a look could tell."""

    @property
    def verdict(self) -> Equivalence:
        """What the last look said."""
        return self.looks[-1].verdict if self.looks else Equivalence.INCONCLUSIVE

    def sample(self, side: str, clock: str | None = None) -> dict[str, list[float]]:
        """Log ratios of a side, by phase, pair after pair."""
        found: dict[str, list[float]] = {}
        for pair in self.pairs:
            for phase, value in pair.log_ratios.get(side, {}).get(clock or self.clock, {}).items():
                found.setdefault(phase, []).append(value)
        return found


def measure(
    sides: Mapping[str, Load],
    *,
    bound: float,
    seconds: float,
    seed: int,
    clock: str = CPU,
    warm_seconds: float = 0.0,
    advance: Callable[[int], None] = lambda _: None,
) -> Measurement:
    """Measure sides against the one called ``base``; judge the one called ``merged``.

    Other sides (the base again, a contrast) are measured in the pairs before the first look, and told. ``advance`` is
    called with 1 after each pair. ``warm_seconds`` of running come before each pair's first round, where a device has
    clocks that rise with work.
    """
    generator, started = random.Random(seed), time.monotonic()  # noqa: S311 - an order, no secret
    found = Measurement(seed=seed, bound=bound, clock=clock)
    judged = {name: load for name, load in sides.items() if name in {BASE, MERGED}}
    last = 0.0
    for k in range(LOOKS[-1]):
        begun = time.monotonic()
        if k and begun - started + last > seconds:
            found.ran_out = True
            break
        present = sides if k < LOOKS[0] else judged
        if not found.n_rounds:
            found.n_rounds = _n_rounds(sides, seconds, warm_seconds)
        found.pairs.append(_pair(present, found.n_rounds, generator, warm_seconds))
        advance(1)
        last = time.monotonic() - begun
        if k + 1 in LOOKS:
            found.looks.append(look(found.sample(MERGED), bound))
            if found.verdict is not Equivalence.INCONCLUSIVE:
                break
    if found.ran_out and len(found.pairs) >= FEWEST and len(found.pairs) not in LOOKS:
        found.looks.append(look(found.sample(MERGED), bound))  # time ended it, not what was seen: it errs no more often
    found.seconds = time.monotonic() - started
    return found


def _n_rounds(sides: Mapping[str, Load], seconds: float, warm_seconds: float) -> int:
    """Try one set, which is not kept, to see how many rounds a pair can have."""
    begun = time.monotonic()
    loaded = {name: load() for name, load in sides.items()}
    loading = time.monotonic() - begun
    for _ in range(2):  # the first run also allocates
        begun = time.monotonic()
        for side in loaded.values():
            for phase in side.phases:
                side.run(phase)
        a_round = time.monotonic() - begun
    share = seconds / _HOPED_PAIRS - loading - max(a_round, warm_seconds)
    return max(_MIN_ROUNDS, min(_MAX_ROUNDS, int(share / max(a_round, 1e-6))))


def _pair(sides: Mapping[str, Load], n_rounds: int, generator: random.Random, warm_seconds: float) -> Pair:
    order = list(sides)
    generator.shuffle(order)
    loaded = {name: sides[name]() for name in order}
    phases = next(iter(loaded.values())).phases
    begun, is_warm = time.perf_counter(), False
    while not is_warm:
        for side in loaded.values():
            for phase in phases:
                side.run(phase)
        is_warm = time.perf_counter() - begun >= warm_seconds
    taken: dict[tuple[str, str], list[Times]] = {(name, phase): [] for name in sides for phase in phases}
    for _ in range(n_rounds):
        for phase in phases:
            generator.shuffle(order)
            for name in order:
                taken[name, phase].append(loaded[name].run(phase))
    first_loaded = tuple(loaded)
    loaded.clear()  # no cycles: every session is gone before the next pair is loaded
    return Pair(
        order=first_loaded,
        log_ratios={
            name: {
                clock: {phase: _median_log_ratio(taken[name, phase], taken[BASE, phase], clock) for phase in phases}
                for clock in (CPU, WALL)
            }
            for name in sides
            if name != BASE
        },
        medians={name: {phase: median(t.cpu for t in taken[name, phase]) for phase in phases} for name in sides},
    )


def _median_log_ratio(side: list[Times], base: list[Times], clock: str) -> float:
    """The middle one of the rounds' log ratios; a clock too coarse to see a run gives no ratio: 0."""
    ratios = [
        math.log(one / other)
        for a, b in zip(side, base, strict=True)
        if (one := getattr(a, clock)) > 0 and (other := getattr(b, clock)) > 0
    ]
    return median(ratios) if ratios else 0.0
