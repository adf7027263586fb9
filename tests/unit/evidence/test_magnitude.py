"""The largest values at modules' borders."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_deploy.evidence.magnitude import RangeReport, recording, summarise
from lora_deploy.evidence.verdict import Verdict


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(2, 2, bias=False)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, **more: Any) -> dict[str, Any]:
        return {"hidden": [self.up(x)], "mask": attention_mask, "ids": torch.tensor([10**9])}


def record(block: Block, x: Tensor, **inputs: Any) -> dict[str, float]:
    with recording(dict(block.named_modules())) as found:
        block(x, **inputs)
    return found


def test_inputs_and_outputs_count_each_under_its_module() -> None:
    block = Block()
    block.up.weight.data = torch.tensor([[10.0, 0.0], [0.0, -100.0]])
    assert record(block, torch.tensor([[-3.0, 2.0]])) == {"": 200.0, "up": 200.0}
    block.up.weight.data *= 0
    assert record(block, torch.tensor([[-3.0, 2.0]])) == {"": 3.0, "up": 3.0}


def test_masks_are_no_values() -> None:
    lowest = torch.finfo(torch.float32).min
    found = record(Block(), torch.ones(1, 2), attention_mask=torch.full((1, 2), lowest))
    assert max(found.values()) < 10


def test_hooks_are_gone_afterwards() -> None:
    block = Block()
    record(block, torch.ones(1, 2))
    assert not block._forward_hooks
    assert not block.up._forward_hooks


@pytest.mark.parametrize(
    ("value", "verdict", "word"),
    [
        (100.0, Verdict.PASS, ""),
        (16_377.0, Verdict.PASS, "more than a quarter"),
        (65_504.0, Verdict.PASS, "more than a quarter"),
        (65_505.0, Verdict.FAIL, "exceeds"),
        (float("inf"), Verdict.FAIL, "exceeds"),
    ],
)
def test_float16_fails_above_its_range_and_warns_above_a_quarter(value: float, verdict: Verdict, word: str) -> None:
    report = summarise({"a": 1.0, "b.c": value}, applies=True)
    assert report.verdict is verdict
    assert word in report.warning
    assert bool(report.warning) is bool(word)
    assert ("b.c" in report.warning) is bool(word)
    other = summarise({"b.c": value}, applies=False)
    assert (other.verdict, other.warning) == (Verdict.PASS, "")


def test_the_innermost_name_says_where() -> None:
    report = summarise({"": 7.0, "a": 7.0, "a.b": 7.0, "z": 8.0}, applies=True)
    assert isinstance(report, RangeReport)
    assert report.largest[0] == ("z", 8.0)
    assert report.n_modules == 4
