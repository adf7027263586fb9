"""When a quantised export passes: each limit from both sides, and what is left of an adapter."""

from __future__ import annotations

import math

import pytest
import torch

from lora_deploy.evidence.divergence import Divergence, diverge
from lora_deploy.evidence.quantised_report import HARMLESS, LEAST_SHARE, SUSPICIOUS, Loss, judged
from lora_deploy.evidence.survival import Survival, survivals
from lora_deploy.evidence.verdict import Verdict

EFFECT = 0.4


def of_mean(mean: float) -> Divergence:
    rows = torch.zeros(1, 4)
    found = diverge("logits", rows, rows)
    return Divergence(**{name: getattr(found, name) for name in Divergence.__slots__} | {"mean": mean, "largest": mean})


def loss(*, quantise: float = 0.01, base: float = 0.01, share: float = 1.0, noise: float = 0.0) -> Loss:
    length = math.hypot(share, noise)
    return Loss(
        run="whole texts",
        output="logits",
        merge=of_mean(1e-11),
        export=of_mean(1e-11),
        quantise=of_mean(quantise),
        whole=of_mean(quantise),
        base=of_mean(base),
        effect=of_mean(EFFECT),
        survival=Survival(cosine=share / length if length else 0.0, norm_ratio=length),
    )


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (loss(), Verdict.PASS),
        (loss(quantise=0.99 * EFFECT, base=0.3), Verdict.PASS),
        (loss(quantise=1.01 * EFFECT, base=0.3), Verdict.FAIL),
        (loss(quantise=math.inf), Verdict.FAIL),
        (loss(quantise=math.nan), Verdict.FAIL),
        (loss(share=1.01 * LEAST_SHARE), Verdict.PASS),
        (loss(share=0.99 * LEAST_SHARE), Verdict.FAIL),
        (loss(share=0.0), Verdict.FAIL),
        (loss(share=math.nan), Verdict.FAIL),
        (loss(share=1.0, noise=4.0), Verdict.PASS),  # noise is judged by what it costs, not here
        (loss(quantise=0.2, base=1.01 * 0.2 / SUSPICIOUS), Verdict.PASS),
        (loss(quantise=0.2, base=0.99 * 0.2 / SUSPICIOUS), Verdict.INCONCLUSIVE),
        (loss(quantise=0.99 * HARMLESS * EFFECT, base=1e-6), Verdict.PASS),
        (loss(quantise=1.01 * HARMLESS * EFFECT, base=1e-6), Verdict.INCONCLUSIVE),
    ],
)
def test_a_loss_is_judged_by_the_adapters_effect_and_by_the_bases_own_loss(entry: Loss, expected: Verdict) -> None:
    report = judged("onnx-int4", (loss(), entry), {"quantised": 1})
    assert report.verdict is expected, report.reason
    assert bool(report.reason) is (expected is not Verdict.PASS)


def test_the_gravest_loss_speaks_and_nothing_compared_is_no_pass() -> None:
    report = judged("onnx-int4", (loss(quantise=0.2, base=1e-6), loss(quantise=1.0)), {})
    assert report.verdict is Verdict.FAIL
    assert "quantising moves the outputs by 1, the adapter by 0.4" in report.reason
    assert judged("onnx-int4", (), {}).verdict is Verdict.INCONCLUSIVE


def rows(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_noise_beside_the_change_leaves_its_share_at_one_and_the_base_itself_has_none() -> None:
    base, change, noise = rows(0, 150, 40), rows(1, 150, 40), 3 * rows(2, 150, 40)

    def found(quantised_change: torch.Tensor) -> Survival:
        sides = (base + change, base, base + quantised_change, base)
        return survivals(*({"p": {"logits": side}} for side in sides))["logits"]

    whole = found(change)
    assert (whole.cosine, whole.norm_ratio) == pytest.approx((1.0, 1.0))
    noisy = found(change + noise)
    assert noisy.cosine < 0.4
    assert noisy.norm_ratio > 3
    assert noisy.share == pytest.approx(1, abs=0.1)
    assert found(0 * change).share == 0
    assert found(-change).share == pytest.approx(-1)
    assert found(2 * change).share == pytest.approx(2)
    assert math.isnan(found(change * math.nan).share)


def test_what_softmax_ignores_is_no_change_of_logits_but_one_of_other_outputs() -> None:
    base, change = rows(0, 6, 8), rows(1, 6, 8)
    shifted = base + change + 100

    def found(name: str) -> float:
        sides = (base + change, base, shifted, base)
        return survivals(*({"p": {name: side}} for side in sides))[name].norm_ratio

    assert found("logits") == pytest.approx(1, rel=1e-4)
    assert found("last_hidden_state") > 50
