"""``lora-deploy formats``: from the registries, without a tensor library, and the same in the README."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from lora_deploy.adapters import READERS
from lora_deploy.cli import main
from lora_deploy.cli.formats import BEGIN, END, as_markdown
from lora_deploy.updates import KINDS

README = Path(__file__).parents[3] / "README.md"


def test_every_reader_and_every_kind_is_listed_with_what_it_is() -> None:
    shown = CliRunner().invoke(main, ["formats"])
    assert shown.exit_code == 0
    for entry in (*READERS, *KINDS):
        assert any(line.split() == [entry.name, *entry.summary.split()] for line in shown.output.splitlines()), entry
    document = json.loads(CliRunner().invoke(main, ["formats", "--json"]).output)
    assert [item["name"] for item in document["formats"]] == [entry.name for entry in READERS]
    assert {item["name"]: item["summary"] for item in document["kinds"]} == {e.name: e.summary for e in KINDS}


def test_the_list_imports_no_tensor_library() -> None:
    program = (
        "import sys; from lora_deploy.cli import main; main(['formats', '--json'], standalone_mode=False);"
        "heavy = {'torch', 'numpy', 'transformers', 'safetensors', 'huggingface_hub'} & set(sys.modules);"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_readmes_table_is_what_the_command_prints() -> None:
    text = README.read_text(encoding="utf-8")
    if BEGIN not in text:
        pytest.skip("the README has no table of formats")
    held = text[text.index(BEGIN) : text.index(END) + len(END)]
    assert held == as_markdown(), "paste what `lora-deploy formats --markdown` prints"


def test_a_table_keeps_what_markdown_would_take_for_marks() -> None:
    table = as_markdown()
    assert "<m>" not in table
    assert "&lt;m&gt;.lora_A" in table
    assert table.startswith(BEGIN)
    assert table.endswith(END)
