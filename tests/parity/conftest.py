"""Comparisons of tiny models: all in one process, where a test is not about the other one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from peft import LoraConfig
from safetensors.torch import load_file

from lora_deploy.evidence import parity
from lora_deploy.evidence.forward import run_probes
from lora_deploy.evidence.graph_parity import Graphs
from lora_deploy.evidence.graphs import GraphFolder, find_graphs
from lora_deploy.evidence.loading import load_model
from lora_deploy.evidence.probe import Probe
from lora_deploy.evidence.reload import Reloaded
from tests.parity.exported import export_decoder, with_weights
from tests.parity.exports import Case as ExportCase
from tests.parity.exports import prepare
from tests.parity.plans import Case, merged_case
from tests.peer.models import VOCABULARY, llama, t5, vit


def run_here(folder: Path, architecture: str, probes: Sequence[Probe]) -> Reloaded:
    model, missing = load_model(folder, architecture)
    outputs = run_probes(model, probes)
    return Reloaded(outputs=outputs, missing=tuple(missing), load_seconds=0.0, run_seconds=0.0, peak_bytes=0)


@pytest.fixture
def in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reload in this process: what a fresh one adds is tested by itself, and takes seconds."""
    monkeypatch.setattr(parity, "run_reloaded", run_here)


@pytest.fixture(scope="module")
def module_in_one_process() -> Iterator[None]:
    """As ``in_one_process``, for fixtures of a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity, "run_reloaded", run_here)
        yield


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A merge in float32 and graphs of its base and of itself."""

    case: Case
    base: GraphFolder
    merged: GraphFolder

    @property
    def graphs(self) -> Graphs:
        return Graphs(merged=self.merged, base=self.base)


def folder_of(path: Path) -> GraphFolder:
    found = find_graphs(path)
    assert found is not None
    return found


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Export a tiny Llama once (some 15 seconds), and put the merged weights into a copy of its graph."""
    folder = tmp_path_factory.mktemp("exported")
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    case = merged_case(llama(hidden_size=32, intermediate_size=48), config, folder, dtype="float32")
    base = export_decoder(llama(hidden_size=32, intermediate_size=48), folder / "base-onnx", VOCABULARY)
    weights = load_file(case.trained.base / "model.safetensors")
    merged = load_file(case.merged.root / "model.safetensors")
    with_weights(base / "model.onnx", weights, merged, folder / "merged-onnx")
    return Exported(case=case, base=folder_of(base), merged=folder_of(folder / "merged-onnx"))


@pytest.fixture(scope="session")
def vision(tmp_path_factory: pytest.TempPathFactory) -> ExportCase:
    """An image classifier with a head of its own."""
    folder = tmp_path_factory.mktemp("vit")
    return prepare(vit(), ["q_proj", "v_proj"], folder, modules_to_save=["classifier"], init_lora_weights=False)


@pytest.fixture(scope="session")
def translator(tmp_path_factory: pytest.TempPathFactory) -> ExportCase:
    """An encoder-decoder, in three graphs."""
    return prepare(t5(), ["q", "v", "wi"], tmp_path_factory.mktemp("t5"), init_lora_weights=False)
