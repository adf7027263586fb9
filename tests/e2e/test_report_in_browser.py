"""The report in a real browser: nothing is fetched, nothing is wrong on the console, everybody can read it."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_deploy.checkpoint import read_json
from lora_deploy.merge.record import RecordedFinding, read_record
from lora_deploy.release.manifest import read_manifest
from lora_deploy.release.options import Acceptance
from lora_deploy.release.report import report_html
from tests.unit.release.records import card_facts

FIXTURE = Path(__file__).parents[1] / "fixtures" / "release" / "schema-1"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WIDTHS = (360, 820, 1400)
PIXEL = base64.b64encode(
    bytes.fromhex(
        "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c6360606060000000050001a5"
        "f645400000000049454e44ae426082"
    )
).decode()

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (Debian's package chromium)")


def facts(**changes: Any) -> Any:
    import dataclasses

    record = read_record(FIXTURE)
    evidence = read_json(FIXTURE / "evidence.json")
    manifest = read_manifest(FIXTURE)
    base = card_facts(record)
    return dataclasses.replace(base, evidence=evidence, verdicts=manifest.evidence.verdicts, **changes)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that a report can show: plots, tables, gaps, findings that look like markup, pictures."""
    found = facts(
        accepted=(Acceptance(code="latency-missing", because="<script>alert(1)</script>"),),
        findings=(RecordedFinding(code="x", severity="warn", target="<b>t</b>", message="m" * 200),),
    )
    picture = {"name": "merged", "relative_l2": 0.01, "cosine": 1.0, "png": PIXEL}
    evidence = dict(found.evidence)
    evidence["parity"] = {**evidence["parity"], "pictures": [picture, {**picture, "name": "base", "relative_l2": None}]}
    object.__setattr__(found, "evidence", evidence)
    path = tmp_path_factory.mktemp("report") / "report.html"
    sizes = [(file.path, file.n_bytes) for file in read_manifest(FIXTURE).files]
    path.write_text(report_html(found, sizes))
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module", params=[(scheme, width) for scheme in ("light", "dark") for width in WIDTHS], ids=str)
def page(request: pytest.FixtureRequest, browser: Any, report: Path) -> Iterator[Any]:
    scheme, width = request.param
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    opened = context.new_page()
    opened.said, opened.asked = [], []
    opened.on("console", lambda message: opened.said.append(message.text))
    opened.on("pageerror", lambda error: opened.said.append(str(error)))
    opened.on("request", lambda asked: opened.asked.append(asked.url))
    opened.goto(report.as_uri())
    yield opened
    context.close()


def test_it_says_nothing_on_the_console_and_asks_nobody(page: Any, report: Path) -> None:
    assert page.said == []
    assert [url for url in page.asked if not url.startswith("data:")] == [report.as_uri()]


def test_nothing_but_plots_and_tables_scrolls_sideways(page: Any) -> None:
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_everybody_can_read_it(page: Any) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed").Axe()
    found = axe.run(page).response
    assert "color-contrast" in {rule["id"] for rule in found["passes"]}, "contrast was looked at"
    assert [(rule["id"], rule["nodes"][0]["html"][:100]) for rule in found["violations"]] == []


def test_text_is_text(page: Any) -> None:
    assert page.locator("script").count() == 0
    assert page.locator("p.open").inner_text().endswith("<script>alert(1)</script>")
    assert page.locator("img").evaluate_all("images => images.every(image => image.naturalWidth > 0)")


def test_on_paper_nothing_is_cut_off(browser: Any, report: Path) -> None:
    """A4 at 96 dots an inch: what scrolls on a screen has to fit there."""
    page = browser.new_page(viewport={"width": 794, "height": 1123})
    page.emulate_media(media="print")
    page.goto(report.as_uri())
    hidden = "[...document.querySelectorAll('.scroll')].filter(box => box.scrollWidth > box.clientWidth).length"
    assert page.locator(".scroll").count() > 3
    assert page.evaluate(hidden) == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 794
    page.close()


def test_what_axe_would_not_like_is_seen(browser: Any, report: Path, tmp_path: Path) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed").Axe()
    pale = tmp_path / "pale.html"
    pale.write_text(report.read_text().replace("--soft: #5b6168", "--soft: #b0b5ba"))
    context = browser.new_context(color_scheme="light")
    opened = context.new_page()
    opened.goto(pale.as_uri())
    assert "color-contrast" in {rule["id"] for rule in axe.run(opened).response["violations"]}
    context.close()
