"""Latency: proof and measurement weighed, pairs and looks and time, on simulated sides."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lora_deploy.cli.latency_tables import latency_rows
from lora_deploy.evidence.equivalence import LOOKS, Equivalence
from lora_deploy.evidence.latency import (
    CONTRAST,
    LatencyOptions,
    LatencyReport,
    Proof,
    conclude,
    measure_twice,
    prove_by,
)
from lora_deploy.evidence.timing import AGAIN, BASE, CPU, MERGED, WALL, Load, Measurement, Times, measure
from lora_deploy.evidence.verdict import Verdict

EQUAL, DIFFERENT, OPEN = Equivalence.EQUAL, Equivalence.DIFFERENT, Equivalence.INCONCLUSIVE
ALIVE: set[int] = set()
PLENTY = 1e9
"""Seconds: whether time runs out must not depend on the machine that tests."""


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_deploy.evidence.timing._MAX_ROUNDS", 9)


class Simulated:
    """A session: a level of its own, noise in every run."""

    phases = ("prefill", "decode")

    def __init__(self, generator: random.Random, ratio: float, session_spread: float, run_spread: float) -> None:
        self._generator, self._run_spread = generator, run_spread
        self._level = ratio * math.exp(generator.gauss(0, session_spread))
        ALIVE.add(id(self))

    def __del__(self) -> None:
        ALIVE.discard(id(self))

    def run(self, phase: str) -> Times:
        cpu = 0.01 * self._level * math.exp(self._generator.gauss(0, self._run_spread))
        return Times(cpu, cpu * math.exp(self._generator.gauss(0, 0.5)))  # a busy machine's wall clock


def sides(
    ratio: float = 1.0, session_spread: float = 0.012, run_spread: float = 0.05, seed: int = 1
) -> dict[str, Load]:
    generator = random.Random(seed)

    def load(r: float) -> Load:
        return lambda: Simulated(generator, r, session_spread, run_spread)

    return {BASE: load(1.0), MERGED: load(ratio), AGAIN: load(1.0)}


def measured(ratio: float = 1.0, *, seconds: float = PLENTY, **spreads: float) -> Measurement:
    return measure(sides(ratio, **spreads), bound=0.03, seconds=seconds, seed=3)


def test_equal_sides_are_found_equal_and_slower_ones_different() -> None:
    assert measured().verdict is EQUAL
    slower, faster = measured(1.08), measured(0.92)
    assert (slower.verdict, faster.verdict) == (DIFFERENT, DIFFERENT)
    assert slower.looks[0].intervals["decode"].ratio == pytest.approx(1.08, rel=0.03)


def test_looks_come_at_fixed_numbers_and_the_first_that_tells_ends_it() -> None:
    found = measured(session_spread=0.3)
    assert [entry.n_pairs for entry in found.looks] == list(LOOKS)
    assert (len(found.pairs), found.verdict) == (LOOKS[-1], OPEN)
    assert len(measured(1.2).pairs) == LOOKS[0]


def test_every_pair_is_loaded_afresh_in_random_order_and_nothing_stays() -> None:
    found = measured(session_spread=0.3)
    early = [pair.order for pair in found.pairs[: LOOKS[0]]]
    assert all(set(order) == {BASE, MERGED, AGAIN} for order in early)
    assert len(set(early)) > 2
    assert {pair.order for pair in found.pairs[LOOKS[0] :]} == {(BASE, MERGED), (MERGED, BASE)}
    assert not ALIVE


def test_the_base_beside_itself_shows_the_noise() -> None:
    found = measured(1.08)
    again = found.sample(AGAIN)["decode"]
    assert len(again) == LOOKS[0]
    assert abs(sum(again) / len(again)) < 0.02


def test_the_cpu_clock_decides_and_the_wall_clock_is_told() -> None:
    found = measured()
    wall = found.sample(MERGED, WALL)["decode"]
    cpu = found.sample(MERGED, CPU)["decode"]
    assert sum(x * x for x in wall) > 10 * sum(x * x for x in cpu)


def test_the_same_seed_gives_the_same_figures() -> None:
    one, other = (measure(sides(), bound=0.03, seconds=PLENTY, seed=3) for _ in range(2))
    assert one.n_rounds == other.n_rounds
    assert [pair.order for pair in one.pairs] == [pair.order for pair in other.pairs]
    assert one.sample(MERGED) == other.sample(MERGED)


def test_time_that_runs_out_ends_it_and_what_was_seen_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 0.5  # every glance at the clock takes half a second
        return now[0]

    monkeypatch.setattr("lora_deploy.evidence.timing.time.monotonic", clock)
    found = measured(seconds=8.0)
    assert found.ran_out
    assert len(found.pairs) < LOOKS[0]
    assert [entry.n_pairs for entry in found.looks] == [len(found.pairs)]


# ------------------------------------------------------------------------------------------------ proof and measurement


@pytest.mark.parametrize(
    ("is_equal", "measured_as", "verdict"),
    [
        (True, EQUAL, Verdict.PASS),
        (True, OPEN, Verdict.PASS),
        (True, None, Verdict.PASS),
        (True, DIFFERENT, Verdict.FAIL),
        (False, EQUAL, Verdict.PASS),
        (False, OPEN, Verdict.INCONCLUSIVE),
        (False, DIFFERENT, Verdict.FAIL),
        (None, EQUAL, Verdict.PASS),
        (None, None, Verdict.INCONCLUSIVE),
        (None, DIFFERENT, Verdict.FAIL),
    ],
)
def test_proof_or_measurement_suffices_and_a_difference_fails(
    is_equal: bool | None, measured_as: Equivalence | None, verdict: Verdict
) -> None:
    found, reason = conclude(Proof(is_equal=is_equal, reason="why"), measured_as)
    assert found is verdict
    assert bool(reason) is (verdict is not Verdict.PASS)


def changing(*ratios: float) -> dict[str, Load]:
    """Sides whose merged one changes its speed when it is measured again."""
    made = [sides(ratio, seed=k) for k, ratio in enumerate(ratios)]
    n_loads = {BASE: 0}

    def of(name: str) -> Callable[[], Simulated]:
        def load() -> Simulated:
            n_loads[BASE] += name == BASE
            current = made[min(len(made) - 1, (n_loads[BASE] - 1) // (LOOKS[0] + 1) if n_loads[BASE] else 0)]
            return current[name]()  # type: ignore[return-value]

        return load

    return {name: of(name) for name in (BASE, MERGED, AGAIN)}


def test_equal_graphs_that_seem_different_are_measured_once_more() -> None:
    options = LatencyOptions(seconds=PLENTY)
    once = measure_twice(changing(1.0), options, is_proven=True)
    assert [found.verdict for found in once] == [EQUAL]
    recovered = measure_twice(changing(1.2, 1.0), options, is_proven=True)
    assert [found.verdict for found in recovered] == [DIFFERENT, EQUAL]
    assert recovered[0].seed != recovered[1].seed
    twice = measure_twice(changing(1.2, 1.2), options, is_proven=True)
    assert [found.verdict for found in twice] == [DIFFERENT, DIFFERENT]
    unproven = measure_twice(changing(1.2, 1.0), options, is_proven=False)
    assert [found.verdict for found in unproven] == [DIFFERENT]


def test_a_proof_is_a_shared_digest_or_the_first_difference(tmp_path: Path) -> None:
    one, other = tmp_path / "a.onnx", tmp_path / "b.onnx"
    equal = prove_by(lambda _: "abc", lambda *_: None)(one, other)
    assert (equal.is_equal, equal.reason) == (True, "canonical digest abc")
    names = prove_by(lambda path: path.name, lambda *_: "node 3: Add, base has Mul")(one, other)
    assert (names.is_equal, names.reason) == (False, "node 3: Add, base has Mul")
    nameless = prove_by(lambda path: path.name, lambda *_: None)(one, other)
    assert (nameless.is_equal, nameless.reason) == (False, "digests a.onnx and b.onnx differ")


def test_the_report_keeps_every_pair() -> None:
    found = measured(1.08)
    report = LatencyReport(
        verdict=Verdict.FAIL, proof=Proof(is_equal=False, reason="x"), measurements=(found,), workload="w"
    )
    said = report.to_json()
    (told,) = said["measurements"]
    assert len(told["pairs"]) == len(found.pairs)
    assert said["ratios"]["merged"]["cpu"]["decode"]["ratio"] == pytest.approx(1.08, rel=0.03)
    assert said["ratios"]["base again"]["cpu"]["decode"]["n"] == LOOKS[0]
    assert said["ratios"]["unmerged"]["cpu"] == {}


def test_the_contrast_is_told_beside_the_verdict_and_decides_nothing() -> None:
    equal = sides(1.0)
    measurement = measure({**equal, CONTRAST: sides(1.3)[MERGED]}, bound=0.03, seconds=PLENTY, seed=3)
    assert measurement.verdict is EQUAL
    proof = Proof(is_equal=True, reason="canonical digest x")
    report = LatencyReport(verdict=Verdict.PASS, proof=proof, measurements=(measurement,))
    found = report.intervals(CONTRAST)
    assert all(1.2 < interval.low < interval.high < 1.4 for interval in found.values())
    assert report.to_json()["ratios"][CONTRAST][CPU]["decode"]["ratio"] == found["decode"].ratio
    rows = list(latency_rows(report))
    assert [name for name, _ in rows if name] == ["proof", "measured", BASE, MERGED, AGAIN, CONTRAST]
    assert sum(" / base: 1.3" in text or " / base: 1.2" in text for _, text in rows) == 2
    why = replace(report, why_no_contrast="w: found a dora update")
    assert ("unmerged", "not measured: w: found a dora update") in list(latency_rows(why))
    assert why.to_json()["why_no_contrast"] == "w: found a dora update"
