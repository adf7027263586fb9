"""Tolerances are sums of floors, and power is effect by tolerance."""

from __future__ import annotations

import math

import pytest
import torch

from lora_deploy.evidence.divergence import at_positions, diverge
from lora_deploy.evidence.tolerance import Power, Share, Tolerance, export_limit, merge_share


def share(mean: float, largest: float, name: str = "merge") -> Share:
    return Share(name=name, mean=mean, largest=largest, max_abs=mean, source="")


def test_a_tolerance_is_a_multiple_of_the_sum_of_its_shares_and_says_so() -> None:
    found = Tolerance(output="logits", shares=(share(1e-6, 1e-5), share(2e-6, 1e-5, "export")))
    assert found.mean == pytest.approx(1.8e-5)
    assert found.largest == pytest.approx(32e-5)
    assert found.reason == "6 x (merge 1e-06 + export 2e-06)"
    assert found.clear_lead == pytest.approx(3e-5)


@pytest.mark.parametrize(("error", "passes"), [(0.0, True), (1e-4, True), (1.0, False), (math.nan, False)])
def test_a_subject_passes_within_both_bounds(error: float, passes: bool) -> None:
    rows = torch.randn(10, 5)
    floor = diverge("logits", rows, rows + 1e-3 * torch.randn(10, 5))
    bound = Tolerance(output="logits", shares=(share(floor.mean, floor.largest),))
    changed = rows.clone()
    changed[0, 0] += error
    assert bound.allows(diverge("logits", rows, changed)) is passes


def test_the_worst_position_alone_can_fail() -> None:
    rows = torch.zeros(1000, 5)
    changed = rows.clone()
    changed[7, 0] = 0.1
    found = diverge("logits", rows, changed)
    assert not Tolerance(output="logits", shares=(share(1.0, found.largest / 17),)).allows(found)
    assert Tolerance(output="logits", shares=(share(1.0, found.largest / 15),)).allows(found)


@pytest.mark.parametrize(("effect", "enough"), [(0.99e-4, False), (1e-4, True), (0.0, False)])
def test_power_needs_ten_times_the_tolerance(effect: float, enough: bool) -> None:
    found = Power(output="logits", effect=effect, tolerance=1e-5)
    assert found.is_enough is enough


def test_what_would_just_show_is_the_root_because_divergences_are_quadratic() -> None:
    assert Power(output="logits", effect=1.0, tolerance=1e-4).smallest_visible == pytest.approx(0.01)
    assert Power(output="logits", effect=0.0, tolerance=1e-4).smallest_visible == math.inf
    assert Power(output="logits", effect=0.0, tolerance=0.0).is_enough is False


def test_the_merge_share_is_the_largest_of_its_seeds() -> None:
    rows = torch.randn(10, 5)
    runs = [{"p/logits": diverge("logits", rows, rows + scale * torch.randn(10, 5))} for scale in (1e-3, 3e-3, 2e-3)]
    found = merge_share(runs, "float16")["logits"]
    assert found.mean == max(run["p/logits"].mean for run in runs)
    assert found.largest == max(run["p/logits"].largest for run in runs)
    assert "float16, 3 seeds" in found.source


def test_floors_can_be_taken_at_some_positions() -> None:
    rows = torch.randn(6, 5)
    whole = diverge("logits", rows, rows + torch.tensor([0, 0, 0, 0, 0.1, 0.2])[:, None] * torch.randn(6, 5))
    mask = torch.tensor([False, False, False, True, True, False])
    parts = {"p/logits": whole, "q/logits": whole}
    found = at_positions(parts, {"p": mask})
    assert set(found) == {"p/logits"}
    assert found["p/logits"].n_positions == 2
    assert found["p/logits"].mean == pytest.approx((whole.positions[3] + whole.positions[4]) / 2)
    assert found["p/logits"].largest == whole.positions[4]
    assert at_positions(parts, {"p": torch.zeros(6, dtype=torch.bool)}) == {}


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-9), (torch.float16, 0.067)])
def test_no_floor_excuses_a_graph_of_something_else(dtype: torch.dtype, limit: float) -> None:
    assert export_limit(1e-12, dtype) == pytest.approx(limit, rel=0.01)
    assert export_limit(0.0, torch.float32) > 0
