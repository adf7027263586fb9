"""Parity layer by layer: agrees with the whole model's, names the layer of a fault, and holds one layer in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_deploy.checkpoint import open_checkpoint
from lora_deploy.evidence import parity
from lora_deploy.evidence.architecture import Absence, find_architecture
from lora_deploy.evidence.chanced import DTypes
from lora_deploy.evidence.forward import run_probes
from lora_deploy.evidence.layerwise import run_layerwise
from lora_deploy.evidence.loading import load_model
from lora_deploy.evidence.parity import ParityOptions, check_parity
from lora_deploy.evidence.parity_report import ParityReport
from lora_deploy.evidence.passage import Passage
from lora_deploy.evidence.probe import Probe, make_probes
from lora_deploy.evidence.reference import unmerged
from lora_deploy.evidence.skeleton import Skeleton, placed
from lora_deploy.evidence.tolerance import POWER
from lora_deploy.evidence.verdict import Verdict
from lora_deploy.merge.budget import private_bytes
from lora_deploy.validate import BindOptions
from tests.parity.plans import Case, merged_case
from tests.peer.models import gpt2, llama, llava, mixtral, opt, qwen2_moe, t5, vit, whisper
from tests.peer.trained import save_base

pytestmark = pytest.mark.usefixtures("in_one_process")
LINEAR = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
BY_LAYER = ParityOptions(layerwise=True)
SQUARE = "model.layers.1.self_attn.q_proj.weight"


def lora(*targets: str, **options: Any) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), **options)


def verdicts(report: ParityReport) -> dict[str, Verdict]:
    """By part."""
    return {subject.facts["part"]: subject.verdict for subject in report.subjects}


# ----------------------------------------------------------------------------------------------------- part by part


@pytest.mark.parametrize(
    "make", [llama, lambda: gpt2(n_positions=64), mixtral, qwen2_moe, opt, t5, whisper, vit, llava]
)
def test_parts_one_by_one_give_what_the_whole_model_gives_to_the_bit(
    make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(save_base(make().float(), tmp_path))
    architecture = find_architecture(checkpoint.config)
    assert not isinstance(architecture, Absence)
    probes = make_probes(checkpoint.config, architecture)
    whole, _ = load_model(tmp_path, architecture.name)
    skeleton = Skeleton(checkpoint, architecture.name)
    last: dict[str, Any] = {}
    with placed(skeleton.model, skeleton.read_rest()):
        for stop in Passage(skeleton.model, skeleton.parts, probes).stops():
            module = skeleton.model.get_submodule(stop.part)
            with placed(module, skeleton.read(stop.part), lambda name, part=stop.part: f"{part}.{name}"):  # type: ignore[misc]
                for name, call in stop.calls.items():
                    last[name] = call.of(module)
                    stop.answer(name, last[name])
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())
    with torch.inference_mode():
        assert all(torch.equal(last[probe.name], whole(**probe.inputs).logits) for probe in probes)


ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], LoraConfig]] = {
    "Llama": (llama, LINEAR),
    "GPT-2, Conv1D": (lambda: gpt2(n_positions=64), lora("c_attn", "c_proj", "c_fc", fan_in_fan_out=True)),
    "Qwen2-MoE, experts apart on disk": (qwen2_moe, lora("q_proj", "gate_proj", "up_proj")),
    "Mixtral, experts": (mixtral, lora("q_proj", target_parameters=["mlp.experts.gate_up_proj"])),
    "DoRA": (llama, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", use_dora=True)),
    "embedding and head": (llama, lora("embed_tokens", "lm_head", "q_proj")),
    "a head of its own": (llama, lora("q_proj", modules_to_save=["lm_head"])),
    "tied": (lambda: llama(tie_word_embeddings=True), LINEAR),
    "token rows": (llama, lora("q_proj", trainable_token_indices=[1, 20])),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "float16") for name in ARCHITECTURES), *((name, "float32") for name in ("Llama", "a head of its own"))],
)
def test_a_right_merge_passes_and_the_base_fails_as_with_the_whole_model(name: str, dtype: str, tmp_path: Path) -> None:
    model, config = ARCHITECTURES[name]
    case = merged_case(model(), config, tmp_path, dtype=dtype)
    report = case.parity(options=BY_LAYER)
    assert report.verdict is Verdict.PASS, report.reason
    assert (report.way, report.is_independent) == ("layer by layer", True)
    assert any("layer by layer" in note for note in report.notes)
    bare = Case(trained=case.trained, plan=case.plan, merged=case.plan.binding.checkpoint).parity(options=BY_LAYER)
    assert bare.verdict is Verdict.FAIL
    compared = [subject for subject in report.subjects if subject.overall]
    assert all(
        entry.mean <= 0.5 * bound.mean
        for subject in compared
        for entry, bound in zip(subject.overall, subject.tolerances, strict=True)
    )
    changed = {entry.output.partition(": ")[0] for entry in report.power}
    assert len(changed) >= 2
    assert all(entry.ratio > POWER for entry in report.power)


def test_parts_are_fed_what_the_unmerged_model_feeds_them(tmp_path: Path) -> None:
    case = merged_case(llama(), LINEAR, tmp_path)
    architecture = find_architecture(case.plan.config)
    assert not isinstance(architecture, Absence)
    probes = make_probes(case.plan.config, architecture)
    found = run_layerwise(case.plan, case.merged, architecture, probes, dtypes_of(case), lambda _: None)
    assert not isinstance(found, Absence)
    model, _ = load_model(case.trained.base, architecture.name)
    with unmerged(model, case.plan) as peer:
        assert not isinstance(peer, Absence)
        whole = run_probes(peer.model, probes)
    for probe, outputs in found.outputs.items():
        assert torch.equal(outputs["logits"], whole[probe]["logits"])


def dtypes_of(case: Case) -> DTypes:
    return DTypes.of(case.merged.tensors, {tensor.spec.name for tensor in case.plan.tensors if tensor.updates})


# ------------------------------------------------------------------------------------------------------------- faults


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    model = llama(hidden_size=32, intermediate_size=48, num_hidden_layers=3)
    return merged_case(model, LINEAR, tmp_path_factory.mktemp("case"), dtype=request.param)


@pytest.fixture(scope="module")
def weights(case: Case) -> tuple[Tensor, Tensor]:
    """Base and what the adapter adds, of one square matrix."""
    base = load_file(case.trained.base / "model.safetensors")[SQUARE].double()
    return base, case.trained.merged()[SQUARE] - base


def transposed(base: Tensor, delta: Tensor) -> Tensor:
    return base + delta.T


def scaled(base: Tensor, delta: Tensor) -> Tensor:
    return base + 1.1 * delta


def left_out(base: Tensor, delta: Tensor) -> Tensor:
    return base


@pytest.mark.parametrize("fault", [transposed, scaled, left_out], ids=lambda fault: fault.__name__)
def test_the_layer_of_a_fault_is_named_and_no_other(
    fault: Callable[[Tensor, Tensor], Tensor], case: Case, weights: tuple[Tensor, Tensor]
) -> None:
    file = case.merged.root / "model.safetensors"
    right, merged = file.read_bytes(), load_file(file)
    try:
        save_file({**merged, SQUARE: fault(*weights).to(merged[SQUARE].dtype)}, file, {"format": "pt"})
        report = case.parity(options=BY_LAYER)
    finally:
        file.write_bytes(right)
    assert report.verdict is Verdict.FAIL
    assert "model.layers.1: " in report.reason
    assert {part for part, verdict in verdicts(report).items() if verdict is Verdict.FAIL} == {"model.layers.1"}
    assert case.parity(options=BY_LAYER).verdict is Verdict.PASS


def test_a_layer_whose_adapter_does_too_little_is_inconclusive_and_named(tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", alpha_pattern={r".*layers\.1\..*": 0.01})
    case = merged_case(llama(), config, tmp_path, dtype="bfloat16")
    report = case.parity(options=BY_LAYER)
    assert report.verdict is Verdict.INCONCLUSIVE
    assert {part for part, verdict in verdicts(report).items() if verdict is not Verdict.PASS} == {"model.layers.1"}
    assert "a missing one would hardly have shown" in report.reason


# --------------------------------------------------------------------------------------- what it is, and what it is not


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (llama, LINEAR),
        (llama, lora("q_proj", trainable_token_indices=[1, 20])),
        (llama, lora("q_proj", modules_to_save=["lm_head"])),
        (lambda: gpt2(n_positions=64), lora("c_attn", "c_proj", "c_fc", fan_in_fan_out=True)),
    ],
    ids=["linear", "token rows", "a head of its own", "Conv1D"],
)
def test_what_peft_would_load_otherwise_runs_on_activations_and_says_so(
    make: Callable[[], nn.Module], config: LoraConfig, tmp_path: Path
) -> None:
    case = merged_case(make(), config, tmp_path, bind_options=BindOptions(weights=(1.0,)))
    report = case.parity(options=BY_LAYER)
    assert report.verdict is Verdict.PASS, report.reason
    assert not report.is_independent
    assert any("shares our reader" in note for note in report.notes)
    bare = Case(trained=case.trained, plan=case.plan, merged=case.plan.binding.checkpoint).parity(options=BY_LAYER)
    assert bare.verdict is Verdict.FAIL


def test_pissa_needs_the_whole_model_and_is_inconclusive(tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights="pissa")
    report = merged_case(llama(), config, tmp_path).parity(options=BY_LAYER)
    assert report.verdict is Verdict.INCONCLUSIVE
    assert "takes this kind of adapter out of the weights" in report.reason


def test_a_model_that_does_not_fit_into_memory_is_compared_layer_by_layer(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "needed_bytes", lambda *_, **__: 10**15)
    report = case.parity()
    assert (report.verdict, report.way) == (Verdict.PASS, "layer by layer")
    assert any("needs 1000000.0 GB" in note for note in report.notes)
    monkeypatch.setattr(parity, "layerwise_bytes", lambda *_: 10**14)
    report = check_parity(case.plan, case.merged)
    assert isinstance(report, ParityReport)
    assert report.verdict is Verdict.INCONCLUSIVE
    assert "layer by layer it needs 100000.0 GB" in report.reason
    assert "replay" in report.hint


def test_adapted_layers_that_no_probe_reaches_are_inconclusive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def texts(*args: Any, **options: Any) -> tuple[Probe, ...]:
        return tuple(probe for probe in make_probes(*args, **options) if "pixel_values" not in probe.inputs)

    monkeypatch.setattr(parity, "make_probes", texts)
    config = lora(r".*language_model.*q_proj|.*vision_tower.*q_proj")
    config.target_modules = r".*(language_model|vision_tower).*q_proj"
    report = merged_case(llava(), config, tmp_path).parity(options=BY_LAYER)
    assert report.verdict is Verdict.INCONCLUSIVE
    unreached = [s.facts["part"] for s in report.subjects if s.reason == "no probe reaches it"]
    assert len(unreached) == 2
    assert all("vision" in part for part in unreached)


def test_memory_is_that_of_a_few_layers_not_of_the_model(tmp_path: Path) -> None:
    n_layers = 16
    model = llama(hidden_size=192, intermediate_size=1024, num_hidden_layers=n_layers)
    case = merged_case(model, lora("q_proj", "down_proj"), tmp_path)
    architecture = find_architecture(case.plan.config)
    assert not isinstance(architecture, Absence)
    layer_bytes = Skeleton(case.plan.binding.checkpoint, architecture.name).largest_bytes
    probes = make_probes(case.plan.config, architecture)
    del model
    start, sizes = private_bytes(), []
    found = run_layerwise(
        case.plan, case.merged, architecture, probes, dtypes_of(case), lambda _: sizes.append(private_bytes())
    )
    assert not isinstance(found, Absence)
    assert all(subject.verdict is Verdict.PASS for subject in found.subjects)
    whole_bytes = n_layers * layer_bytes
    assert len(sizes) == n_layers + 3
    assert max(sizes) - start < whole_bytes / 3, (max(sizes) - start, layer_bytes, whole_bytes)
