"""``verify`` on quantised exports: shares of the loss, what is left of the adapter, and faults planted on purpose.

The model is the one of ``test_decoders``, whose graph is then in the cache.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from peft import LoraConfig
from transformers.exporters import ExportedModel

from lora_deploy.evidence.dossier import Evidence
from lora_deploy.evidence.latency import LatencyReport
from lora_deploy.evidence.options import VerifyOptions
from lora_deploy.evidence.outcome import Outcome
from lora_deploy.evidence.parity_report import ParityReport
from lora_deploy.evidence.probe import positions
from lora_deploy.evidence.quantised_report import Loss, QuantisedReport
from lora_deploy.evidence.replay import ReplayReport
from lora_deploy.evidence.verdict import Check, Verdict
from lora_deploy.export.binding_table import BindingTable, Quantised
from lora_deploy.export.options import ExportOptions
from lora_deploy.merge.options import MergeOptions
from lora_deploy.pipeline import export, merge, verify
from tests.parity.exports import assert_close, contents, export_with, run, tokens
from tests.peer.models import llama
from tests.peer.trained import MEMORY_BYTES, Trained, train

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("in_one_process")]
METHODS = ("int4", "int8-blockwise", "int8")
OPTIONS = MergeOptions(dtype="float32", n_workers=1, memory_bytes=MEMORY_BYTES)


@pytest.fixture(scope="module")
def graph_cache() -> str:
    """Name the session's cache, where the fixtures' graphs are."""
    return os.environ["LORA_DEPLOY_CACHE"]


@pytest.fixture(autouse=True)
def cached_graphs(graph_cache: str, _empty_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tests, too, find graphs there: making one takes half a minute."""
    monkeypatch.setenv("LORA_DEPLOY_CACHE", graph_cache)


def trained_with(folder: Path, alpha: float) -> Trained:
    """Train an adapter whose effect ``alpha`` scales."""
    config = LoraConfig(r=4, lora_alpha=alpha, target_modules="all-linear", init_lora_weights=False)
    return train(llama(hidden_size=32, head_dim=8), config, folder)


def merged_of(trained: Trained) -> Path:
    folder = trained.base.parent / "merged"
    merge(trained.adapter, base=trained.base, output=folder, merge_options=OPTIONS)
    return folder


@pytest.fixture(scope="module")
def strong(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return trained_with(tmp_path_factory.mktemp("strong"), 1.0)


@pytest.fixture(scope="module")
def merged(strong: Trained) -> Path:
    """Hold graphs in float32 and in all three quantised forms."""
    folder = merged_of(strong)
    export(folder)
    for method in METHODS:
        export_with(folder, quantize=method)
    return folder


@pytest.fixture
def copy(merged: Path, tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "merged"
    shutil.copytree(merged, folder)
    yield folder
    shutil.rmtree(folder)


def without(folder: Path, *names: str) -> Path:
    for name in names:
        shutil.rmtree(folder / name)
    return folder


def checked(folder: Path, *only: Check) -> Evidence:
    return verify(folder, options=VerifyOptions(only=only, seconds=1))


def quantised_in(found: Evidence) -> dict[str, QuantisedReport]:
    assert isinstance(found.parity, ParityReport)
    return {report.name: report for report in found.parity.quantised}


def loss_of(report: QuantisedReport, run: str = "whole texts") -> Loss:
    return next(loss for loss in report.losses if loss.run == run)


@pytest.fixture(scope="module")
def found(merged: Path, module_in_one_process: None) -> Evidence:
    return checked(merged, Check.REPLAY, Check.PARITY)


def test_a_strong_adapter_survives_8_bit_blocks(found: Evidence) -> None:
    report = quantised_in(found)["onnx-int8-blockwise"]
    assert report.verdict is Verdict.PASS, report.reason
    assert {loss.run for loss in report.losses} == {"whole texts", "over a cache"}
    for loss in report.losses:
        assert loss.survival.share == pytest.approx(1, abs=0.1)
        assert loss.survival.cosine > 0.9
        assert loss.quantise.mean < 0.1 * loss.effect.mean
        assert loss.quantise.n_positions == loss.base.n_positions == loss.effect.n_positions
    assert report.n_bytes["quantised"] < report.n_bytes["plain"]


def test_the_loss_is_split_and_almost_all_of_it_is_quantisations(found: Evidence) -> None:
    for report in quantised_in(found).values():
        for loss in report.losses:
            assert loss.merge.mean < 1e-8
            assert loss.export.mean < 1e-8
            assert loss.quantise.mean == pytest.approx(loss.whole.mean, rel=1e-3)
            assert loss.base.mean > 1e-6


def test_4_bits_lose_more_than_8_and_every_byte_of_all_is_replayed(found: Evidence) -> None:
    reports = quantised_in(found)
    assert list(reports) == ["onnx-int4", "onnx-int8", "onnx-int8-blockwise"]
    assert loss_of(reports["onnx-int4"]).quantise.mean > 10 * loss_of(reports["onnx-int8-blockwise"]).quantise.mean
    assert loss_of(reports["onnx-int8"]).quantise.mean > loss_of(reports["onnx-int8-blockwise"]).quantise.mean
    assert isinstance(found.replay, ReplayReport)
    assert found.replay.verdict is Verdict.PASS, found.replay.faults


def test_float_graphs_are_judged_as_before(found: Evidence) -> None:
    assert isinstance(found.parity, ParityReport)
    names = [subject.name for subject in found.parity.subjects]
    assert len(names) == len(set(names))
    assert {"merged checkpoint, reloaded", "onnx prefill", "onnx greedy"} <= set(names)
    assert all(subject.verdict is Verdict.PASS for subject in found.parity.subjects)


def test_without_float_graphs_they_are_made_for_the_check_and_latency_is_proven(copy: Path, found: Evidence) -> None:
    without(copy, "onnx", "onnx-int8", "onnx-int4")
    again = checked(copy)
    report = quantised_in(again)["onnx-int8-blockwise"]
    assert loss_of(report).quantise == loss_of(quantised_in(found)["onnx-int8-blockwise"]).quantise
    assert isinstance(again.parity, ParityReport)
    assert "onnx prefill" in {subject.name for subject in again.parity.subjects}
    assert not isinstance(again.latency, LatencyReport)
    latency = again.quantised_latency["onnx-int8-blockwise"]
    assert latency.proof.is_equal, latency.proof.reason
    assert set(latency.costs) == {"base", "merged"}
    assert not (copy / "onnx").exists()


def test_the_quantised_base_passed_off_as_merged_fails(strong: Trained, copy: Path) -> None:
    without(copy, *(f"onnx-{method}" for method in METHODS))
    export(strong.base, output=copy / "onnx-int8-blockwise", export_options=ExportOptions(quantize="int8-blockwise"))
    found = checked(copy, Check.REPLAY, Check.PARITY)
    assert isinstance(found.replay, ReplayReport)
    assert found.replay.verdict is Verdict.FAIL
    assert {entry.outcome for entry in found.replay.faults} == {Outcome.WRONG_GRAPH}
    report = quantised_in(found)["onnx-int8-blockwise"]
    assert report.verdict is Verdict.FAIL
    assert loss_of(report).survival.share == 0
    assert isinstance(found.parity, ParityReport)
    assert found.parity.verdict is Verdict.FAIL
    assert "onnx-int8-blockwise: " in found.parity.reason


@pytest.mark.parametrize("method", METHODS)
def test_two_quantised_weights_that_were_swapped_are_named(method: str, copy: Path) -> None:
    folder = without(copy, "onnx", *(f"onnx-{other}" for other in METHODS if other != method)) / f"onnx-{method}"
    table = BindingTable.model_validate_json((folder / "binding_table.json").read_bytes())
    slots = [slot for slot in table.slots if isinstance(slot.origin, Quantised)]
    one, other = next((a, b) for a in slots for b in slots if a.offset < b.offset and a.n_bytes == b.n_bytes)
    path = folder / one.file
    right = path.read_bytes()
    swapped = bytearray(right)
    swapped[one.offset : one.offset + one.n_bytes] = right[other.offset : other.offset + other.n_bytes]
    swapped[other.offset : other.offset + other.n_bytes] = right[one.offset : one.offset + one.n_bytes]
    path.write_bytes(swapped)
    report = checked(copy, Check.REPLAY).replay
    assert isinstance(report, ReplayReport)
    assert report.verdict is Verdict.FAIL
    assert [entry.name for entry in report.faults] == [f"onnx-{method}/export.json"] * 2
    for entry, slot in zip(report.faults, (one, other), strict=True):
        assert entry.message.startswith(f"{slot.file}: byte {slot.offset}: is not ")


def test_other_bytes_by_another_onnxruntime_are_no_proof_of_a_fault(copy: Path) -> None:
    folder = without(copy, "onnx", "onnx-int8", "onnx-int4") / "onnx-int8-blockwise"
    data = bytearray((folder / "prefill.onnx.data").read_bytes())
    data[0] ^= 1
    (folder / "prefill.onnx.data").write_bytes(data)
    record = folder / "export.json"
    record.write_text(record.read_text().replace('"onnxruntime": "1.', '"onnxruntime": "0.'))
    report = checked(copy, Check.REPLAY).replay
    assert isinstance(report, ReplayReport)
    assert report.verdict is Verdict.INCONCLUSIVE
    assert "quantised by onnxruntime 0." in report.faults[0].message


def test_a_tiny_adapter_that_4_bits_destroy_fails_though_every_byte_is_right(tmp_path: Path) -> None:
    folder = merged_of(trained_with(tmp_path, 0.02))
    export_with(folder, quantize="int4")
    found = checked(folder, Check.REPLAY, Check.PARITY)
    assert isinstance(found.replay, ReplayReport)
    assert found.replay.verdict is Verdict.PASS
    report = quantised_in(found)["onnx-int4"]
    assert report.verdict is Verdict.FAIL
    assert "quantising moves the outputs by" in report.reason
    assert loss_of(report).quantise.mean > loss_of(report).effect.mean
    assert isinstance(found.parity, ParityReport)
    assert all(subject.verdict is Verdict.PASS for subject in found.parity.subjects)
    assert found.parity.verdict is Verdict.FAIL


@pytest.mark.parametrize("method", METHODS)
def test_quantised_graphs_belong_to_the_base(method: str, strong: Trained, merged: Path, tmp_path: Path) -> None:
    of_base = export(strong.base, output=tmp_path / "base", export_options=ExportOptions(quantize=method))
    folder = merged / f"onnx-{method}"
    assert contents(of_base.root, "*.onnx", "binding_table.json") == contents(folder, "*.onnx", "binding_table.json")
    assert contents(of_base.root, "prefill.onnx.data") != contents(folder, "prefill.onnx.data")
    assert (folder / "decode.onnx.data").stat().st_size == 0


def test_an_export_straight_from_adapter_and_base_is_the_same(strong: Trained, merged: Path, tmp_path: Path) -> None:
    straight = export(
        adapters=strong.adapter,
        base=strong.base,
        output=tmp_path / "straight",
        merge_options=OPTIONS,
        export_options=ExportOptions(quantize="int4"),
    )
    assert contents(straight.root, "*.data", "*.onnx") == contents(merged / "onnx-int4", "*.data", "*.onnx")


def test_transformers_loads_quantised_graphs_and_says_what_they_say(merged: Path) -> None:
    folder = merged / "onnx-int4"
    batch = tokens(2, 6, n_padded=2)
    inputs = {**batch, "position_ids": positions(batch["attention_mask"])}
    found = ExportedModel.from_pretrained(folder, device="cpu").runners["prefill"](**inputs)
    assert_close(found.logits, run(folder / "prefill.onnx", inputs)["logits"])
