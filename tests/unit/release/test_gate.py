"""What failed is never released; what is not proven needs somebody's word."""

from __future__ import annotations

from typing import Any

import pytest

from lora_deploy.errors import InconclusiveError, RecipeError, ReleaseError
from lora_deploy.release.gate import pass_gate
from lora_deploy.release.options import Acceptance

FILES = {"model.safetensors": "aa", "onnx/model.onnx": "bb"}
PASS = {"verdict": "pass"}


def evidence(**reports: Any) -> dict[str, Any]:
    return {"files": FILES, "replay": PASS, "parity": PASS, "latency": PASS} | reports


def accept(*codes: str) -> list[Acceptance]:
    return [Acceptance(code=code, because="we know") for code in codes]


def test_everything_passed() -> None:
    passage = pass_gate(evidence(), FILES, (), has_graphs=True)
    assert passage.verdicts == {"replay": "pass", "parity": "pass", "latency": "pass"}


def test_weights_alone_need_no_latency() -> None:
    found = evidence(latency={"verdict": "not applicable", "reason": "there are no graphs"})
    assert "latency" not in pass_gate(found, FILES, (), has_graphs=False).verdicts


@pytest.mark.parametrize("check", ["replay", "parity", "latency"])
def test_a_failure_cannot_be_accepted(check: str) -> None:
    found = evidence(**{check: {"verdict": "fail", "reason": "wrong"}})
    with pytest.raises(ReleaseError, match=f"{check} failed: wrong") as caught:
        pass_gate(found, FILES, accept(f"{check}-fail"), has_graphs=True)
    assert caught.value.exit_code == 8


@pytest.mark.parametrize(
    ("report", "code"),
    [
        ({"verdict": "inconclusive", "reason": "cannot tell"}, "parity-inconclusive"),
        ({"verdict": "skipped", "reason": "left out"}, "parity-missing"),
        ({"verdict": "not applicable", "reason": "no architecture"}, "parity-missing"),
        (None, "parity-missing"),
        ({"verdict": "PASS"}, "parity-missing"),
    ],
)
def test_a_gap_needs_an_acceptance_of_its_own_name(report: Any, code: str) -> None:
    found = evidence(parity=report)
    with pytest.raises(InconclusiveError, match=code) as caught:
        pass_gate(found, FILES, (), has_graphs=True)
    assert caught.value.code == code
    assert pass_gate(found, FILES, accept(code), has_graphs=True).accepted[0].because == "we know"


def test_no_evidence_is_missing_everywhere() -> None:
    with pytest.raises(InconclusiveError, match=r"replay-missing.*parity-missing.*latency-missing"):
        pass_gate(None, FILES, (), has_graphs=True)


def test_evidence_about_other_bytes_is_none() -> None:
    with pytest.raises(InconclusiveError, match=r"not about onnx/model\.onnx as it is now"):
        pass_gate(evidence(), FILES | {"onnx/model.onnx": "cc"}, (), has_graphs=True)


def test_an_acceptance_of_what_is_not_in_the_way_is_an_error() -> None:
    with pytest.raises(RecipeError, match="is not in the way"):
        pass_gate(evidence(), FILES, accept("parity-missing"), has_graphs=True)


def test_an_acceptance_without_a_reason_is_an_error() -> None:
    found = evidence(parity=None)
    with pytest.raises(RecipeError, match="gives no reason"):
        pass_gate(found, FILES, [Acceptance(code="parity-missing", because=" ")], has_graphs=True)
