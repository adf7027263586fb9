"""The coverage table's run: every architecture in a process of its own; rows go to ``$LORA_DEPLOY_COVERAGE``, if set."""

from __future__ import annotations

import json
import multiprocessing
import os
import warnings
from dataclasses import asdict
from pathlib import Path

import pytest
import transformers

from tests.coverage.architectures import ARCHITECTURES, Architecture
from tests.coverage.cover import Row, cover

SECONDS = 600
"""Longest that one architecture may take, on a shared machine."""


def _write_row(architecture: Architecture, folder: Path, out: Path) -> None:
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    out.write_text(json.dumps(asdict(cover(architecture, folder)), indent=1) + "\n")


def _covered(architecture: Architecture, folder: Path) -> Row:
    """Cover in a copy of this process, where the libraries are loaded already."""
    out = Path(os.environ.get("LORA_DEPLOY_COVERAGE") or folder) / f"{architecture.name.replace(' ', '-')}.json"
    out.unlink(missing_ok=True)
    process = multiprocessing.get_context("fork").Process(target=_write_row, args=(architecture, folder, out))
    process.start()
    process.join(SECONDS)
    if not out.is_file():
        reason = f"takes more than {SECONDS} s" if process.is_alive() else f"died with code {process.exitcode}"
        process.kill()
        out.write_text(json.dumps(asdict(Row(name=architecture.name, cls=architecture.cls, error=reason))) + "\n")
    entry = json.loads(out.read_text())
    return Row(**{**entry, "graphs": tuple(entry["graphs"])})


@pytest.mark.nightly
@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=lambda entry: entry.name)
def test_an_architecture_is_exported_and_proven_or_is_known_not_to_be(
    architecture: Architecture, tmp_path: Path
) -> None:
    row = _covered(architecture, tmp_path)
    if architecture.fault:
        assert architecture.fault in row.error
    else:
        assert row.is_good, row
