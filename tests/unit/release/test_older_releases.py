"""Releases that earlier versions wrote stay readable, and whole."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lora_deploy.release.manifest import SCHEMA, check
from tests.e2e.commands import document

FIXTURES = Path(__file__).parents[2] / "fixtures" / "release"


def test_there_is_one_of_every_schema_version() -> None:
    assert {path.name for path in FIXTURES.iterdir()} == {f"schema-{version}" for version in range(1, SCHEMA + 1)}


@pytest.mark.parametrize("root", sorted(FIXTURES.iterdir()), ids=lambda path: path.name)
def test_a_release_of_its_time_is_read_checked_and_pushed(root: Path, tmp_path: Path) -> None:
    manifest = check(root)
    assert manifest.evidence.verdicts == {"replay": "pass", "parity": "pass", "latency": "pass"}
    pushed = document("push", root, tmp_path / "published")["receipt"]
    assert len(pushed["digests"]) == len(manifest.files) + 1
    assert document("pull", tmp_path / "published", tmp_path / "back")["content_digest"] == manifest.content.digest


@pytest.mark.parametrize("root", sorted(FIXTURES.iterdir()), ids=lambda path: path.name)
def test_no_text_of_a_release_names_a_place_on_a_machine(root: Path) -> None:
    for path in root.rglob("*"):
        if path.suffix in {".json", ".md", ".html"}:
            assert not re.search(r"(?<![\w.:/])/(home|root|tmp|work|Users)/", path.read_text()), path
