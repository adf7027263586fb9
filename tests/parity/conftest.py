"""Comparisons of tiny models: all in one process, where a test is not about the other one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from lora_deploy.evidence import parity
from lora_deploy.evidence.forward import run_probes
from lora_deploy.evidence.loading import load_model
from lora_deploy.evidence.probe import Probe
from lora_deploy.evidence.reload import Reloaded


def run_here(folder: Path, architecture: str, probes: Sequence[Probe]) -> Reloaded:
    model, missing = load_model(folder, architecture)
    outputs = run_probes(model, probes)
    return Reloaded(outputs=outputs, missing=tuple(missing), load_seconds=0.0, run_seconds=0.0, peak_bytes=0)


@pytest.fixture
def in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reload in this process: what a fresh one adds is tested by itself, and takes seconds."""
    monkeypatch.setattr(parity, "run_reloaded", run_here)
