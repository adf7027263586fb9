"""How results look: in eighty columns, in a pipe, as JSON, and not at all."""

import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from lora_deploy.cli.screen import Screen
from lora_deploy.errors import Finding, Severity

LONG = "model.language_model.layers.17.block_sparse_moe.experts.127.gate_up_proj.some_more.weight"
HEADERS = ["update of", "‖A‖", "‖B‖", "‖Δ‖", "eff. rank"]
ROWS = [[LONG, "1.23e-05", "1.23e-05", "1.23e-05", "15.9"], ["h.0.weight", "1", "2", "3", "4"]]


class Terminal(io.StringIO):
    """A stdout that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_narrow_terminal_folds_names_and_keeps_every_character(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "80")
    Screen().table(HEADERS, ROWS)
    lines = terminal.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in terminal.getvalue()
    names = "".join(line.split("  ")[0].strip() for line in lines[1:-1])
    assert names == LONG
    assert lines[1].split()[1:] == ROWS[0][1:]


def test_in_a_pipe_a_row_is_a_line_without_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    Screen().table(HEADERS, ROWS)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [LONG, "h.0.weight"]
    assert "\x1b" not in "".join(lines)
    assert all(line == line.rstrip() for line in lines)


def test_names_that_look_like_markup_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    Screen().table(["name", "n"], [["[bold]x[/bold].:smile:.weight", "1"]])
    assert "[bold]x[/bold].:smile:.weight" in capsys.readouterr().out


def test_findings_come_gravest_first_with_where_they_were_read(capsys: pytest.CaptureFixture[str]) -> None:
    note = Finding(code="n", severity=Severity.NOTE, target="a", message="fine")
    error = Finding(code="shape-mismatch", severity=Severity.ERROR, target="b", message="no", source="b.lora_A")
    Screen().findings([note, error])
    assert capsys.readouterr().out.splitlines() == [
        "  error shape-mismatch  b: no",
        "                        from b.lora_A",
        "  note  n               a: fine",
    ]


def test_quiet_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen()
    screen.is_quiet = True
    screen.line("x")
    screen.table(HEADERS, ROWS)
    screen.fields([("a", "b")])
    screen.close()
    assert capsys.readouterr() == ("", "")
    assert screen.progress() is None


@dataclass(frozen=True, slots=True)
class Sample:
    path: Path
    figure: float
    severity: Severity


def test_a_document_holds_dataclasses_paths_and_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen(as_json=True)
    screen.line("not shown")
    screen.publish({"sample": Sample(Path("a/b"), float("nan"), Severity.WARN), "shape": (2, 3)})
    screen.publish({"more": True})
    screen.close()
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {
        "sample": {"path": "a/b", "figure": None, "severity": "warn"},
        "shape": [2, 3],
        "more": True,
    }


def test_hundreds_of_findings_are_cut_short_with_a_count(capsys: pytest.CaptureFixture[str]) -> None:
    Screen().findings(
        Finding(code="n", severity=Severity.NOTE, target=f"layers.{k}", message="square") for k in range(150)
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 21
    assert lines[-1] == "  … and 130 more (--json lists all)"
