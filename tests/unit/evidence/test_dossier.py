"""The whole of the evidence: what its parts make of it, and what is written where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_deploy import pipeline
from lora_deploy.errors import InconclusiveError, ParityError, ReplayError
from lora_deploy.evidence.dossier import EVIDENCE_NAME, Evidence
from lora_deploy.evidence.options import VerifyOptions
from lora_deploy.evidence.outcome import NotApplicable
from lora_deploy.evidence.parity_report import ParityReport
from lora_deploy.evidence.replay import ReplayReport
from lora_deploy.evidence.tolerance import Power
from lora_deploy.evidence.verdict import Check, Verdict

PASS, FAIL, OPEN = Verdict.PASS, Verdict.FAIL, Verdict.INCONCLUSIVE
ABSENT = NotApplicable(reason="there are no graphs")


def replayed(verdict: Verdict) -> ReplayReport:
    return ReplayReport(verdict=verdict, outcomes=(), n_bytes=1, tolerance="none", seconds=0.1, is_ours=True)


def compared(verdict: Verdict, **fields: Any) -> ParityReport:
    return ParityReport(verdict=verdict, reason="r", probes={}, versions={}, **fields)


@pytest.mark.parametrize(
    ("replay", "parity", "whole"),
    [
        (PASS, PASS, PASS),
        (PASS, None, PASS),
        (None, PASS, PASS),
        (FAIL, PASS, FAIL),
        (PASS, FAIL, FAIL),
        (OPEN, FAIL, FAIL),
        (PASS, OPEN, OPEN),
        (None, None, OPEN),
    ],
)
def test_failures_outweigh_what_is_open_and_absence_counts_for_nothing(
    replay: Verdict | None, parity: Verdict | None, whole: Verdict
) -> None:
    found = Evidence(
        replay=replayed(replay) if replay else ABSENT, parity=compared(parity) if parity else ABSENT, latency=ABSENT
    )
    assert found.verdict is whole


def test_the_gravest_check_speaks() -> None:
    def raised(replay: Verdict, parity: Verdict) -> None:
        evidence = Evidence(replay=replayed(replay), parity=compared(parity, hint="do this"), latency=ABSENT)
        pipeline.require_pass(evidence, "out")

    raised(PASS, PASS)
    with pytest.raises(ReplayError):
        raised(FAIL, FAIL)
    with pytest.raises(ParityError, match="out: does not do what the unmerged model does: r") as caught:
        raised(PASS, FAIL)
    assert (caught.value.hint, caught.value.exit_code) == ("do this", 7)
    with pytest.raises(InconclusiveError, match="parity: r") as open_:
        raised(PASS, OPEN)
    assert (open_.value.hint, open_.value.exit_code) == ("do this", 10)


def test_nothing_checked_is_no_pass() -> None:
    with pytest.raises(InconclusiveError, match="nothing was checked"):
        pipeline.require_pass(Evidence(replay=ABSENT, parity=ABSENT, latency=ABSENT), "out")


def test_it_is_written_beside_our_record_as_canonical_json(tmp_path: Path) -> None:
    infinite = Power(output="logits", effect=1.0, tolerance=0.0)
    evidence = Evidence(replay=replayed(PASS), parity=compared(PASS, power=(infinite,)), latency=ABSENT)
    assert evidence.write(tmp_path) is None
    (tmp_path / "merge.json").touch()
    path = evidence.write(tmp_path)
    assert path == tmp_path / EVIDENCE_NAME
    text = path.read_text()
    said = json.loads(text)
    assert text == json.dumps(said, indent=2, sort_keys=True) + "\n"
    assert (said["schema"], said["verdict"]) == (1, "pass")
    assert said["parity"]["power"][0]["ratio"] is None  # JSON has no infinity
    assert said["latency"] == {"verdict": "not applicable", "reason": "there are no graphs"}
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.endswith(".tmp")] == []


def test_a_folder_that_cannot_be_written_keeps_its_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_deploy.errors import MergeError
    from lora_deploy.evidence import dossier

    def refuse(*_: object) -> None:
        raise MergeError("read-only")

    (tmp_path / "merge.json").touch()
    monkeypatch.setattr(dossier, "write_text", refuse)
    assert Evidence(replay=replayed(PASS), parity=ABSENT, latency=ABSENT).write(tmp_path) is None


@pytest.mark.parametrize(
    ("only", "skip", "made"),
    [
        ((), (), {"replay", "parity", "latency"}),
        ((Check.PARITY,), (), {"parity"}),
        ((), (Check.PARITY,), {"replay", "latency"}),
        ((Check.PARITY, Check.REPLAY), (Check.PARITY,), {"replay"}),
    ],
)
def test_only_chooses_and_skip_leaves_out(only: tuple[Check, ...], skip: tuple[Check, ...], made: set[str]) -> None:
    options = VerifyOptions(only=only, skip=skip)
    assert {check.value for check in Check if options.includes(check)} == made
