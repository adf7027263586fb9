"""``verify`` on graphs of models that are no decoders: right ones pass in every way they are run, a fault fails in all.

The fault is one module that was not merged, in checkpoint and graphs alike: where they agree, only the reference tells.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
from safetensors.torch import load_file, save_file

from lora_deploy.evidence.graph_timing import TimedGraphs, Workload
from lora_deploy.evidence.graphs import find_graphs
from lora_deploy.evidence.latency import Proof, proof_of, prove_by
from lora_deploy.evidence.options import VerifyOptions
from lora_deploy.evidence.parity_report import ParityReport
from lora_deploy.evidence.verdict import Check, Verdict
from lora_deploy.export.canonical import canonical_digest, first_difference
from lora_deploy.pipeline import export, verify
from tests.parity.conftest import folder_of
from tests.parity.exports import Case, prepare
from tests.peer.models import clip, llava, wav2vec2, whisper

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("in_one_process")]
WEIGHTS = "model.safetensors"
RELOADED, PREFILL, GREEDY = "merged checkpoint, reloaded", "onnx prefill", "onnx greedy"
ONE, TWO, FOUR = (f"onnx decode over a cache, batch {n}" for n in ("1", "2", "4, right-padded"))


@dataclass(frozen=True, kw_only=True)
class Verified:
    """An exported merge, and the same with a fault planted."""

    case: Case
    faulty: Path

    def report(self, folder: Path | None = None, **options: Any) -> ParityReport:
        chosen = VerifyOptions(only=(Check.PARITY,), base_graph=self.case.base_export.root, **options)
        found = verify(folder or self.case.merged, options=chosen).parity
        assert isinstance(found, ParityReport)
        return found


def planted(case: Case, module: str, folder: Path) -> Verified:
    """Take one module's weight from the base, and export that: the graphs' own weights are wrong as well."""
    shutil.copytree(case.merged, folder, ignore=shutil.ignore_patterns("onnx"))
    merged, base = load_file(folder / WEIGHTS), load_file(case.trained.base / WEIGHTS)
    (name,) = (name for name in merged if name.endswith(f"{module}.weight"))
    assert not merged[name].equal(base[name])
    save_file({**merged, name: base[name]}, folder / WEIGHTS, {"format": "pt"})
    export(folder)
    return Verified(case=case, faulty=folder)


MODELS: dict[str, tuple[Callable[[], Any], list[str], str, set[str]]] = {
    "clip": (clip, ["q_proj", "v_proj"], "vision_model.encoder.layers.1.self_attn.q_proj", {RELOADED, PREFILL}),
    "whisper": (
        whisper,
        ["q_proj", "v_proj", "fc1"],
        "decoder.layers.1.encoder_attn.q_proj",
        {RELOADED, PREFILL, ONE, TWO, FOUR, GREEDY},
    ),
    "wav2vec2": (wav2vec2, ["q_proj", "v_proj"], "layers.1.attention.q_proj", {RELOADED, PREFILL}),
    "llava": (
        llava,
        ["q_proj", "v_proj"],
        "vision_tower.encoder.layers.0.self_attn.q_proj",
        {RELOADED, PREFILL, ONE, GREEDY},
    ),
}
NIGHTLY = {"wav2vec2", "llava"}
SHARED: dict[str, tuple[str, str, set[str]]] = {
    "t5": ("translator", "decoder.block.1.layer.1.EncDecAttention.v", {RELOADED, PREFILL, ONE, FOUR, GREEDY}),
    "vit": ("vision", "encoder.layer.1.attention.attention.query", {RELOADED, PREFILL}),
}


@pytest.fixture(
    scope="module",
    params=[*SHARED, *(pytest.param(name, marks=[pytest.mark.nightly] * (name in NIGHTLY)) for name in MODELS)],
)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Verified, set[str]]:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param in SHARED:
        fixture, module, subjects = SHARED[request.param]
        return planted(request.getfixturevalue(fixture), module, folder / "faulty"), subjects
    make, targets, module, subjects = MODELS[request.param]
    case = prepare(make(), targets, folder, init_lora_weights=False)
    return planted(case, module, folder / "faulty"), subjects


def test_right_graphs_pass_in_every_way_they_are_run(model: tuple[Verified, set[str]]) -> None:
    verified, subjects = model
    report = verified.report()
    assert report.verdict is Verdict.PASS, report.reason
    assert report.is_independent
    assert {subject.name for subject in report.subjects} == subjects
    whole = [subject for subject in report.subjects if subject.name in {RELOADED, PREFILL}]
    assert all(entry.mean < 0.5 * b.mean for s in whole for entry, b in zip(s.overall, s.tolerances, strict=True))
    assert {share.name for s in report.subjects[1:] for b in s.tolerances for share in b.shares} == {"merge", "export"}
    assert all(power.ratio > 1e6 for power in report.power)


def test_a_module_that_was_not_merged_fails_in_all_of_them(model: tuple[Verified, set[str]]) -> None:
    verified, subjects = model
    report = verified.report(verified.faulty)
    assert report.verdict is Verdict.FAIL
    failed = {subject.name for subject in report.subjects if subject.verdict is Verdict.FAIL}
    assert failed | {GREEDY} == subjects | {GREEDY}, "greedy choices may survive a small fault"


def test_the_encoder_is_part_of_what_is_timed_and_of_what_is_proven(translator: Case, tmp_path: Path) -> None:
    graphs = folder_of(translator.exported.root)
    timed = TimedGraphs(
        graphs, Workload.of({"vocab_size": 37, "is_encoder_decoder": True}, provider="cpu", n_threads=1)
    )
    assert timed.phases == ("prefill", "decode")
    assert [bound.path.name for bound in timed._runs["prefill"]] == ["encoder.onnx", "prefill.onnx"]
    assert all(timed.run(phase).wall > 0 for phase in timed.phases)
    assert timed._runs["prefill"][0].outputs()[0].shape[:2] == (1, 64)
    assert (1, 1, 37) in {output.shape for output in timed._runs["decode"][0].outputs()}
    prove = prove_by(canonical_digest, first_difference)
    same = proof_of(graphs, folder_of(translator.base_export.root), prove)
    assert same.is_equal
    assert same.reason.count("canonical digest") == 3
    other = shutil.copytree(translator.base_export.root, tmp_path / "other")
    encoder = onnx.load(other / "encoder.onnx", load_external_data=False)
    next(node for node in encoder.graph.node if node.op_type == "MatMul").op_type = "Gemm"
    (other / "encoder.onnx").write_bytes(encoder.SerializeToString())
    changed = proof_of(graphs, folder_of(other), prove)
    assert isinstance(changed, Proof)
    assert changed.is_equal is False
    assert find_graphs(other) is not None


def test_keys_of_another_layer_in_the_decoders_cache_show_in_decoding_alone(translator: Case, tmp_path: Path) -> None:
    other = shutil.copytree(translator.exported.root, tmp_path / "onnx")
    decode = onnx.load(other / "decode.onnx", load_external_data=False)
    one, two = (f"input.past_key_values.cross_attention_cache.layers.{k}.keys" for k in (0, 1))
    for node in decode.graph.node:
        node.input[:] = [{one: two, two: one}.get(name, name) for name in node.input]
    (other / "decode.onnx").write_bytes(decode.SerializeToString())
    merged = shutil.copytree(translator.merged, tmp_path / "merged", ignore=shutil.ignore_patterns("onnx"))
    other.rename(merged / "onnx")
    report = Verified(case=translator, faulty=merged).report(merged)
    found = {subject.name: subject.verdict for subject in report.subjects}
    assert {name for name, verdict in found.items() if verdict is Verdict.FAIL} - {GREEDY} == {ONE, FOUR}
    assert found[PREFILL] is Verdict.PASS
