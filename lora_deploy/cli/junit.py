"""The outcomes of a run as JUnit XML, which every CI system shows: a suite for each cell, a case for each stage."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

from lora_deploy.errors import RecipeError
from lora_deploy.evidence.verdict import Verdict

if TYPE_CHECKING:
    from lora_deploy.pipeline.outcomes import Outcome, RunReport


def write_junit(report: RunReport, path: Path) -> None:
    """Write the outcomes to a file.

    Raises:
        RecipeError: The file cannot be written.
    """
    root = ET.Element("testsuites", name=f"lora-deploy {report.recipe.name}")
    for cell, outcomes in groupby(report.outcomes, key=lambda outcome: outcome.cell):
        _add_suite(root, cell, list(outcomes))
    ET.indent(root)
    try:
        path.write_bytes(ET.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n")
    except OSError as error:
        raise RecipeError(f"--junit {path}: cannot be written: {error.strerror or error}") from error


def _add_suite(root: ET.Element, cell: str, outcomes: list[Outcome]) -> None:
    verdicts = [outcome.verdict for outcome in outcomes]
    seconds = sum(outcome.seconds for outcome in outcomes)
    suite = ET.SubElement(
        root,
        "testsuite",
        name=cell,
        time=f"{seconds:.3f}",
        tests=f"{len(verdicts)}",
        failures=f"{verdicts.count(Verdict.FAIL)}",
        errors=f"{verdicts.count(Verdict.INCONCLUSIVE)}",
    )
    for outcome in outcomes:
        case = ET.SubElement(suite, "testcase", classname=cell, name=outcome.stage.value, time=f"{outcome.seconds:.3f}")
        if outcome.verdict is Verdict.PASS:
            ET.SubElement(case, "system-out").text = _printable(outcome.figure)
            continue
        # JUnit has no third verdict: what could not be checked is an error, which no CI system takes for a pass
        tag = "failure" if outcome.verdict is Verdict.FAIL else "error"
        code = outcome.error.code if outcome.error is not None else outcome.verdict.value
        ET.SubElement(case, tag, type=code, message=_printable(outcome.figure))


def _printable(text: str) -> str:
    """Leave out what XML cannot say."""
    return "".join(c for c in text if c in "\t\n" or (c.isprintable() and ord(c) < 0x110000))
