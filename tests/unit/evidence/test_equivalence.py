"""Student's t against the tables, verdicts on recorded samples, error rates by simulation."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence

import pytest

from lora_deploy.evidence.equivalence import ERROR_RATE, LOOKS, Equivalence, interval, look, student_t

TABLE = {  # one-sided probability, degrees of freedom: value, as printed in tables of the t distribution
    (0.95, 1): 6.314,
    (0.95, 2): 2.920,
    (0.95, 5): 2.015,
    (0.95, 11): 1.796,
    (0.95, 23): 1.714,
    (0.975, 5): 2.571,
    (0.975, 10): 2.228,
    (0.99, 5): 3.365,
    (0.995, 11): 3.106,
    (0.9995, 7): 5.408,
    (0.95, 120): 1.658,
}


@pytest.mark.parametrize(("probability", "degrees"), TABLE)
def test_quantiles_are_the_tables(probability: float, degrees: int) -> None:
    expected = TABLE[probability, degrees]
    assert student_t(probability, degrees) == pytest.approx(expected, abs=6e-4)
    assert student_t(1 - probability, degrees) == pytest.approx(-expected, abs=6e-4)


def test_the_median_is_zero_and_many_degrees_are_the_normal_distribution() -> None:
    assert student_t(0.5, 5) == pytest.approx(0, abs=1e-12)
    assert student_t(0.95, 100_001) == pytest.approx(1.644854, abs=1e-4)


def test_an_interval_of_known_numbers() -> None:
    found = interval([math.log(x) for x in (1.0, 1.1, 1.21)], 0.05)
    half = 2.920 * math.log(1.1) / math.sqrt(3)
    assert found.ratio == pytest.approx(1.1)
    assert (found.low, found.high) == pytest.approx((1.1 * math.exp(-half), 1.1 * math.exp(half)), rel=1e-4)
    assert found.spread == pytest.approx(math.log(1.1))


# Per-session medians as they were recorded on a machine of two cores, November 2026: byte-identical graphs, and the
# base beside itself with its adapter unmerged.
IDENTICAL = [0.012, -0.019, 0.006, -0.011, 0.021, -0.004, 0.009, -0.014, 0.003, 0.011, -0.008, 0.002]
UNMERGED = [0.061, 0.072, 0.048, 0.066, 0.058, 0.069, 0.055, 0.063, 0.071, 0.052, 0.060, 0.067]


def test_identical_graphs_are_equal_and_unmerged_ones_different_at_three_percent() -> None:
    assert look({"decode": IDENTICAL}, 0.03).verdict is Equivalence.EQUAL
    assert look({"decode": UNMERGED}, 0.03).verdict is Equivalence.DIFFERENT
    assert look({"decode": [-x for x in UNMERGED]}, 0.03).verdict is Equivalence.DIFFERENT


def test_every_phase_must_be_equal_and_any_may_be_different() -> None:
    assert look({"prefill": IDENTICAL, "decode": IDENTICAL}, 0.03).verdict is Equivalence.EQUAL
    assert look({"prefill": UNMERGED, "decode": IDENTICAL}, 0.03).verdict is Equivalence.DIFFERENT
    wide = [5 * x for x in IDENTICAL]
    assert look({"prefill": wide, "decode": IDENTICAL}, 0.03).verdict is Equivalence.INCONCLUSIVE


def test_too_few_pairs_say_nothing_however_equal() -> None:
    assert look({"decode": [0.0, 0.0]}, 0.03).verdict is Equivalence.INCONCLUSIVE
    assert look({"decode": [0.0, 0.0, 0.0]}, 0.03).verdict is Equivalence.EQUAL


def test_an_interval_across_the_bound_is_neither() -> None:
    around = [math.log(1.03) + x for x in IDENTICAL]
    assert look({"decode": around}, 0.03).verdict is Equivalence.INCONCLUSIVE


def sequential(samples: Sequence[Sequence[float]], bound: float) -> Equivalence:
    """Judge as the measurement does: look after look, until one tells."""
    for n in LOOKS:
        found = look({str(k): sample[:n] for k, sample in enumerate(samples)}, bound).verdict
        if found is not Equivalence.INCONCLUSIVE:
            return found
    return Equivalence.INCONCLUSIVE


def simulated(mean: float, spread: float, n_phases: int, n_times: int, seed: int) -> Iterator[Equivalence]:
    generator = random.Random(seed)
    for _ in range(n_times):
        samples = [[generator.gauss(mean, spread) for _ in range(LOOKS[-1])] for _ in range(n_phases)]
        yield sequential(samples, 0.03)


def rate(verdict: Equivalence, mean: float, spread: float = 0.02, n_phases: int = 1, n_times: int = 4000) -> float:
    found = list(simulated(mean, spread, n_phases, n_times, seed=int(1e6 * abs(mean)) + n_phases))
    return found.count(verdict) / n_times


@pytest.mark.parametrize("spread", [0.01, 0.02, 0.04])
def test_a_ratio_at_the_bound_is_called_equal_at_most_as_often_as_promised(spread: float) -> None:
    found = rate(Equivalence.EQUAL, math.log(1.03), spread)
    assert found <= ERROR_RATE + 3 * math.sqrt(ERROR_RATE / 4000)


@pytest.mark.parametrize("n_phases", [1, 2])
def test_a_ratio_at_the_bound_is_called_different_at_most_as_often_as_promised(n_phases: int) -> None:
    found = rate(Equivalence.DIFFERENT, math.log(1.03), n_phases=n_phases)
    assert found <= ERROR_RATE + 3 * math.sqrt(ERROR_RATE / 4000)


def test_equal_times_are_mostly_found_equal_and_never_different() -> None:
    assert rate(Equivalence.EQUAL, 0.0, 0.02, n_phases=2, n_times=1000) > 0.95
    assert rate(Equivalence.DIFFERENT, 0.0, 0.02, n_phases=2, n_times=1000) < 0.005


def test_six_percent_are_mostly_found_different() -> None:
    assert rate(Equivalence.DIFFERENT, math.log(1.06), 0.02, n_times=1000) > 0.95
    assert rate(Equivalence.EQUAL, math.log(1.06), 0.02, n_times=1000) == 0
