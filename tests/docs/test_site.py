"""The documentation as a site: it builds strictly, its references are the code's, it asks nobody for anything."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lora_deploy.cli import main
from lora_deploy.recipe.model import Recipe
from tests.docs.blocks import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="extra dev")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def text_of(page: Path) -> str:
    return re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8"))


def test_every_command_and_option_has_its_place(site: Path) -> None:
    text = text_of(site / "reference" / "cli" / "index.html")
    for name, command in main.commands.items():
        assert name in text
        options = {option for parameter in command.params for option in parameter.opts if option.startswith("--")}
        assert {option for option in options if option not in text} == set(), name


def test_every_section_of_a_recipe_and_every_verb_has_its_place(site: Path) -> None:
    recipe = text_of(site / "reference" / "recipe" / "index.html")
    sections = {field.alias or name for name, field in Recipe.model_fields.items()}
    assert {section for section in sections if section not in recipe} == set()
    python = text_of(site / "reference" / "python" / "index.html")
    assert all(f"{verb}(" in python for verb in ("merge", "verify", "export", "release", "push", "finalize"))


def test_no_page_asks_another_site_for_anything(site: Path) -> None:
    asked = set()
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        asked |= set(re.findall(r'<(?:script|img|iframe)[^>]+src="(https?:[^"]+)"', text))
        asked |= set(re.findall(r'<link[^>]+rel="(?:stylesheet|preconnect)"[^>]+href="(https?:[^"]+)"', text))
    assert asked == set()
