"""Figures of how far outputs are apart, on numbers that are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from lora_deploy.errors import EvidenceError
from lora_deploy.evidence.divergence import compare_outputs, diverge, join


def test_kl_is_the_textbooks() -> None:
    reference, subject = torch.randn(150, 11), torch.randn(150, 11)
    log_p, log_q = reference.double().log_softmax(1), subject.double().log_softmax(1)
    expected = functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)
    found = diverge("logits", reference, subject)
    assert found.positions == pytest.approx(expected.tolist(), rel=1e-9)
    assert found.mean == pytest.approx(float(expected.mean()), rel=1e-9)
    assert found.largest == pytest.approx(float(expected.max()), rel=1e-9)
    assert found.is_distribution


def test_equal_rows_diverge_by_nothing_at_all() -> None:
    rows = torch.randn(5, 7) * 30
    found = diverge("logits", rows, rows.clone())
    assert (found.mean, found.largest, found.max_abs, found.relative_l2) == (0, 0, 0, 0)
    assert (found.top1, found.cosine) == (1, pytest.approx(1))


def test_a_divergence_far_below_float64s_own_step_is_seen() -> None:
    """Two classes, logits ±ε apart: KL is ε²/2 · p(1-p) · 4 to first order; sums of p·log p would lose it."""
    reference = torch.zeros(1, 2)
    subject = torch.tensor([[2.0**-30, -(2.0**-30)]])
    assert diverge("logits", reference, subject).mean == pytest.approx(2.0**-60 / 2, rel=1e-6)


def test_a_shift_of_all_logits_is_no_divergence_but_a_difference() -> None:
    rows = torch.randn(4, 9)
    found = diverge("logits", rows, rows + 3)
    assert found.mean < 1e-12
    assert found.max_abs == pytest.approx(3, abs=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("output", ["logits", "last_hidden_state"])
def test_what_is_no_number_diverges_by_infinity(output: str, bad: float) -> None:
    reference = torch.randn(3, 5)
    subject = reference.clone()
    subject[1, 2] = bad
    found = diverge(output, reference, subject)
    assert found.largest == math.inf or (bad == -math.inf and found.largest > 0)
    assert found.max_abs == math.inf


def test_other_outputs_are_measured_by_their_squared_relative_distance() -> None:
    reference = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    subject = torch.tensor([[3.0, 4.5], [0.5, 0.0]])
    found = diverge("pooler_output", reference, subject)
    assert not found.is_distribution
    assert found.positions == pytest.approx((0.25 / 12.5, 0.25 / 12.5))
    assert found.relative_l2 == pytest.approx(math.sqrt(0.5 / 25))
    assert found.cosine == pytest.approx(27 / (5 * math.sqrt(9 + 20.25 + 0.25)))
    assert found.top1 is None


def test_one_logit_has_no_classes() -> None:
    assert not diverge("logits", torch.ones(3, 1), torch.ones(3, 1)).is_distribution


def test_joining_weighs_probes_by_their_positions() -> None:
    rows = torch.randn(6, 4)
    changed = rows + torch.randn(6, 4)
    whole = diverge("logits", rows, changed)
    parts = {
        f"{k}/logits": diverge("logits", rows[cut], changed[cut]) for k, cut in enumerate([slice(0, 1), slice(1, 6)])
    }
    (joined,) = join(parts)
    assert joined.mean == pytest.approx(whole.mean)
    assert (joined.largest, joined.n_positions) == (whole.largest, 6)
    assert joined.positions == pytest.approx(whole.positions)


def test_another_shape_is_an_error_that_names_both() -> None:
    with pytest.raises(EvidenceError, match=r"a: logits: found shape \(2, 3\), the reference has \(2, 4\)"):
        compare_outputs({"a": {"logits": torch.zeros(2, 4)}}, {"a": {"logits": torch.zeros(2, 3)}})
