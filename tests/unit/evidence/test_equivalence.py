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


# Recorded on a shared machine of two cores, November 2026, by `check_latency`: median log ratios of CPU times over 40
# rounds, one for each fresh pair of sessions. A Llama of 3 layers, width 384, its graph beside itself until 60 s were
# over, and beside the graph of the same model with an unmerged LoRA of rank 8.
IDENTICAL_PREFILL = [
    -0.0036, 0.0051, -0.0018, 0.0133, -0.005, -0.0079, -0.018, 0.0135, -0.0007, 0.0022,
    -0.0183, -0.0139, 0.0036, -0.0018, -0.0062, -0.0032, 0.0028, -0.0017, -0.0051,
]  # fmt: skip
IDENTICAL_DECODE = [
    0.0268, 0.0203, 0.0069, 0.0278, -0.0559, -0.0299, -0.0272, 0.0649, 0.0591, 0.0349,
    0.036, 0.0136, -0.0453, 0.032, 0.0057, -0.0036, -0.0396, 0.0238, -0.0247,
]  # fmt: skip
UNMERGED_PREFILL = [0.0644, 0.0711, 0.074, 0.0575, 0.0532, 0.0361]
UNMERGED_DECODE = [0.0461, 0.1006, 0.0794, 0.0786, 0.0232, 0.0483]


def test_recorded_identical_graphs_are_equal_at_three_percent_though_six_pairs_did_not_tell() -> None:
    whole = {"prefill": IDENTICAL_PREFILL, "decode": IDENTICAL_DECODE}
    first = {phase: sample[: LOOKS[0]] for phase, sample in whole.items()}
    assert look(first, 0.03).verdict is Equivalence.INCONCLUSIVE
    assert look(whole, 0.03).verdict is Equivalence.EQUAL


def test_a_recorded_unmerged_graph_is_different_in_its_prefill_and_open_in_its_decode() -> None:
    assert look({"prefill": UNMERGED_PREFILL}, 0.03).verdict is Equivalence.DIFFERENT
    assert look({"prefill": [-x for x in UNMERGED_PREFILL]}, 0.03).verdict is Equivalence.DIFFERENT
    assert look({"decode": UNMERGED_DECODE}, 0.03).verdict is Equivalence.INCONCLUSIVE
    assert look({"prefill": UNMERGED_PREFILL, "decode": UNMERGED_DECODE}, 0.03).verdict is Equivalence.DIFFERENT


def test_every_phase_must_be_equal_and_any_may_be_different() -> None:
    equal = IDENTICAL_PREFILL
    assert look({"prefill": equal, "decode": equal}, 0.03).verdict is Equivalence.EQUAL
    assert look({"prefill": UNMERGED_PREFILL, "decode": equal}, 0.03).verdict is Equivalence.DIFFERENT
    wide = [9 * x for x in equal]
    assert look({"prefill": wide, "decode": equal}, 0.03).verdict is Equivalence.INCONCLUSIVE


def test_too_few_pairs_say_nothing_however_equal() -> None:
    assert look({"decode": [0.0, 0.0]}, 0.03).verdict is Equivalence.INCONCLUSIVE
    assert look({"decode": [0.0, 0.0, 0.0]}, 0.03).verdict is Equivalence.EQUAL


def test_an_interval_across_the_bound_is_neither() -> None:
    around = [math.log(1.03) + x for x in IDENTICAL_PREFILL]
    assert look({"decode": around}, 0.03).verdict is Equivalence.INCONCLUSIVE


N_TIMES = 2000


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


def rate(verdict: Equivalence, mean: float, spread: float = 0.02, n_phases: int = 1, n_times: int = N_TIMES) -> float:
    found = list(simulated(mean, spread, n_phases, n_times, seed=int(1e6 * abs(mean)) + n_phases))
    return found.count(verdict) / n_times


@pytest.mark.parametrize("spread", [0.01, 0.02, 0.04])
def test_a_ratio_at_the_bound_is_called_equal_at_most_as_often_as_promised(spread: float) -> None:
    found = rate(Equivalence.EQUAL, math.log(1.03), spread)
    assert found <= ERROR_RATE + 3 * math.sqrt(ERROR_RATE / N_TIMES)


@pytest.mark.parametrize("n_phases", [1, 2])
def test_a_ratio_at_the_bound_is_called_different_at_most_as_often_as_promised(n_phases: int) -> None:
    found = rate(Equivalence.DIFFERENT, math.log(1.03), n_phases=n_phases)
    assert found <= ERROR_RATE + 3 * math.sqrt(ERROR_RATE / N_TIMES)


def test_equal_times_are_mostly_found_equal_and_never_different() -> None:
    assert rate(Equivalence.EQUAL, 0.0, 0.02, n_phases=2, n_times=500) > 0.95
    assert rate(Equivalence.DIFFERENT, 0.0, 0.02, n_phases=2, n_times=500) < 0.005


def test_six_percent_are_mostly_found_different() -> None:
    assert rate(Equivalence.DIFFERENT, math.log(1.06), 0.02, n_times=500) > 0.95
    assert rate(Equivalence.EQUAL, math.log(1.06), 0.02, n_times=500) == 0
