"""The unmerged model: by PEFT where it reads what was merged, else on activations; and what neither can run."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import DistilBertForSequenceClassification

from lora_deploy.adapters.interface import ReadOptions
from lora_deploy.errors import InputError
from lora_deploy.evidence import architecture as architectures
from lora_deploy.evidence.activation import beside
from lora_deploy.evidence.architecture import Absence
from lora_deploy.evidence.forward import run_probes
from lora_deploy.evidence.loading import load_model
from lora_deploy.evidence.outcome import NotApplicable
from lora_deploy.evidence.parity import check_parity
from lora_deploy.evidence.parity_report import ParityReport
from lora_deploy.evidence.probe import make_probes
from lora_deploy.evidence.reference import peer_reads, unmerged
from lora_deploy.evidence.verdict import Verdict
from lora_deploy.validate import BindOptions
from tests.parity.plans import Case, merged_case
from tests.peer.models import bert, distilbert, gpt2, llama, llava, mixtral, opt, qwen2, t5, whisper

pytestmark = pytest.mark.usefixtures("in_one_process")
LINEAR = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")


def lora(*targets: str, **options: Any) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), **options)


ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], LoraConfig]] = {
    "GPT-2, Conv1D": (lambda: gpt2(n_positions=64), lora("c_attn", "c_proj", "c_fc", fan_in_fan_out=True)),
    "Qwen2": (qwen2, LINEAR),
    "OPT, few positions": (opt, lora("q_proj", "v_proj", "fc1")),
    "T5": (t5, lora("q", "v", "wo")),
    "BERT, two outputs": (bert, lora("query", "value")),
    "a classifier": (
        lambda: distilbert(DistilBertForSequenceClassification),
        lora("q_lin", "v_lin", task_type="SEQ_CLS"),
    ),
    "Whisper": (whisper, lora("q_proj", "v_proj")),
    "LLaVA, by its text": (llava, lora("q_proj", "v_proj")),
    "Mixtral": (mixtral, lora("q_proj", target_parameters=["mlp.experts.gate_up_proj"])),
    "DoRA": (llama, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", use_dora=True)),
    "biases and rsLoRA": (lambda: llama(attention_bias=True), lora("q_proj", use_rslora=True, bias="all")),
    "a tied embedding": (lambda: llama(tie_word_embeddings=True), lora("embed_tokens", "q_proj")),
    "token rows": (llama, lora("q_proj", trainable_token_indices=[1, 20])),
    "a head of its own": (llama, lora("q_proj", modules_to_save=["lm_head"])),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_right_merge_passes_and_the_base_does_not(name: str, tmp_path: Path) -> None:
    model, config = ARCHITECTURES[name]
    case = merged_case(model(), config, tmp_path)
    report = case.parity()
    assert report.verdict is Verdict.PASS, report.reason
    assert report.is_independent
    assert report.reference.endswith("unmerged")
    assert all(
        entry.mean < 0.5 * bound.mean
        for s in report.subjects
        for entry, bound in zip(s.overall, s.tolerances, strict=True)
    )
    bare = Case(trained=case.trained, plan=case.plan, merged=case.plan.binding.checkpoint).parity()
    assert bare.verdict is Verdict.FAIL


# --------------------------------------------------------------------------------------------------------- activations


@pytest.mark.parametrize(
    ("model", "config"),
    [
        (llama, LINEAR),
        (lambda: gpt2(n_positions=64), lora("c_attn", "c_proj", "c_fc", fan_in_fan_out=True)),
        (llama, lora("embed_tokens", "q_proj")),
        (lambda: llama(attention_bias=True), lora("q_proj", bias="lora_only")),
        (llama, lora("q_proj", trainable_token_indices=[1, 20])),
        (llama, lora("q_proj", modules_to_save=["lm_head"])),
    ],
    ids=["linear", "Conv1D", "embedding", "bias", "token rows", "head"],
)
def test_factors_on_activations_are_pefts_forward_pass(
    model: Callable[[], nn.Module], config: LoraConfig, tmp_path: Path
) -> None:
    case = merged_case(model(), config, tmp_path)
    architecture = architectures.find_architecture(case.plan.config)
    assert not isinstance(architecture, Absence)
    probes = make_probes(case.plan.config, architecture)
    loaded, _ = load_model(case.trained.base, architecture.name)
    with beside(copy.deepcopy(loaded), case.plan) as found:
        assert not isinstance(found, Absence), found
    untouched = run_probes(loaded, probes)
    ours_model = copy.deepcopy(loaded)
    with beside(ours_model, case.plan) as found:
        ours = run_probes(ours_model, probes)
    with unmerged(loaded, case.plan) as peer:
        assert not isinstance(peer, Absence)
        theirs = run_probes(peer.model, probes)
    for probe, outputs in theirs.items():
        size = outputs["logits"].abs().max()
        assert (ours[probe]["logits"] - outputs["logits"]).abs().max() < 1e-5 * size
        assert (untouched[probe]["logits"] - outputs["logits"]).abs().max() > 1e-2 * size


def test_a_convolution_is_adapted_on_its_activations() -> None:
    from lora_deploy.evidence.activation import _term

    layer = nn.Conv2d(3, 4, 3, stride=2, padding=1)
    up, down, x = torch.randn(4, 2), torch.randn(2, 27), torch.randn(2, 3, 8, 8)
    delta = (up @ down).view(4, 3, 3, 3)
    expected = torch.nn.functional.conv2d(x, delta, stride=2, padding=1)
    assert torch.allclose(_term(layer, x, up, down), expected, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"bind_options": BindOptions(weights=(0.5,))},
        {"bind_options": BindOptions(exclude=("*.mlp.*",))},
        {"read": ReadOptions(alpha=3.0)},
        {"n_adapters": 2},
    ],
    ids=["a weight", "a pattern", "an alpha", "two adapters"],
)
def test_what_peft_would_load_otherwise_runs_on_activations_and_says_so(
    options: dict[str, Any], tmp_path: Path
) -> None:
    case = merged_case(llama(), LINEAR, tmp_path, **options)
    report = case.parity()
    assert report.verdict is Verdict.PASS, report.reason
    assert not report.is_independent
    assert "shares our reader" in report.reference
    assert any("shares our reader" in note for note in report.notes)


def test_a_kind_defined_on_weights_without_a_peer_is_inconclusive(tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", use_dora=True)
    case = merged_case(llama(), config, tmp_path, bind_options=BindOptions(exclude=("*.mlp.*",)))
    report = case.parity()
    assert report.verdict is Verdict.INCONCLUSIVE
    assert "dora is defined on weights" in report.reason


def test_the_model_is_as_it_was_after_each_rounding(tmp_path: Path) -> None:
    from lora_deploy.evidence.chanced import DTypes

    case = merged_case(llama(), LINEAR, tmp_path)
    architecture = architectures.find_architecture(case.plan.config)
    assert not isinstance(architecture, Absence)
    probes = make_probes(case.plan.config, architecture)[:1]
    model, _ = load_model(case.trained.base, architecture.name)
    with unmerged(model, case.plan) as found:
        assert not isinstance(found, Absence)
        before = run_probes(found.model, probes)
        dtypes = DTypes.of(case.merged.tensors, {t.spec.name for t in case.plan.tensors if t.updates})
        with found.rounded(dtypes, torch.Generator().manual_seed(1)):
            rounded = run_probes(found.model, probes)
        after = run_probes(found.model, probes)
    (name,) = before
    assert torch.equal(before[name]["logits"], after[name]["logits"])
    assert not torch.equal(before[name]["logits"], rounded[name]["logits"])


# -------------------------------------------------------------------------------------------------------------- honesty


def test_peft_is_given_the_file_that_was_merged_or_none(tmp_path: Path) -> None:
    case = merged_case(llama(), LINEAR, tmp_path)
    file = case.trained.adapter / "adapter_model.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(file).items()}, file)
    with pytest.raises(InputError, match="not the adapter that was merged"):
        case.parity()


def test_pefts_configuration_is_the_one_that_was_read(tmp_path: Path) -> None:
    case = merged_case(llama(), LINEAR, tmp_path)
    config = case.trained.adapter / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 16'))
    with pytest.raises(InputError, match=r"adapter_config.json: .* not the adapter that was merged"):
        case.parity()


def test_what_peft_does_not_load_whole_is_inconclusive(tmp_path: Path) -> None:
    case = merged_case(llama(), lora("q_proj"), tmp_path, config_edits={"target_modules": ["q_proj", "k_proj"]})
    report = case.parity()
    assert report.verdict is Verdict.INCONCLUSIVE
    assert "does not load all of the adapter: Found missing adapter keys" in report.reason


def test_what_peft_does_not_load_at_all_is_inconclusive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import peft

    def refuse(*_: object, **__: object) -> None:
        raise ValueError("not this one")

    monkeypatch.setattr(peft.PeftModel, "from_pretrained", refuse)
    report = merged_case(llama(), LINEAR, tmp_path).parity()
    assert report.verdict is Verdict.INCONCLUSIVE
    assert "does not load" in report.reason
    assert "not this one" in report.reason


def test_without_peft_it_is_inconclusive_with_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = merged_case(llama(), LINEAR, tmp_path)
    monkeypatch.setattr("lora_deploy.evidence.reference.missing_packages", lambda *names: list(names))
    report = case.parity()
    assert report.verdict is Verdict.INCONCLUSIVE
    assert "lora-deploy[export]" in report.hint


def test_without_transformers_it_is_inconclusive_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = merged_case(llama(), LINEAR, tmp_path)
    monkeypatch.setattr(architectures, "missing_packages", lambda *_: ["transformers"])
    report = case.parity()
    assert (report.verdict, report.hint) == (Verdict.INCONCLUSIVE, architectures.INSTALL_HINT)


def test_an_architecture_that_nobody_knows_has_no_outputs_to_compare(tmp_path: Path) -> None:
    case = merged_case(llama(), LINEAR, tmp_path)
    for config in ({}, {"model_type": "llama"}, {"model_type": "x", "architectures": ["SomethingForNobody"]}):
        plan = copy.copy(case.plan)
        object.__setattr__(plan, "config", config)
        assert isinstance(check_parity(plan, case.merged), NotApplicable)


def test_a_model_too_large_for_memory_is_said_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = merged_case(llama(), LINEAR, tmp_path)
    monkeypatch.setattr("lora_deploy.evidence.parity.available_bytes", lambda: 100_000)
    monkeypatch.setattr("lora_deploy.evidence.runnable.load_model", lambda *_: sys.exit("loaded"))
    report = case.parity()
    assert report.verdict is Verdict.INCONCLUSIVE
    assert "GB are free" in report.reason
    assert "replay" in report.hint


def test_an_adapter_that_does_nothing_has_no_power(tmp_path: Path) -> None:
    case = merged_case(llama(), LINEAR, tmp_path, bind_options=BindOptions(weights=(1e-9,)), dtype="bfloat16")
    report = case.parity()
    assert report.verdict is Verdict.INCONCLUSIVE
    assert "times the tolerance" in report.reason
    assert "--probes" in report.hint


def test_a_checkpoint_that_lacks_a_tensor_fails(tmp_path: Path) -> None:
    case = merged_case(llama(), LINEAR, tmp_path)
    file = case.merged.root / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, {"format": "pt"})
    report = case.parity()
    assert report.verdict is Verdict.FAIL
    assert "1 parameters are missing, first model.norm.weight" in report.reason


def test_values_beyond_float16_fail_and_name_the_module(tmp_path: Path) -> None:
    def huge() -> nn.Module:
        model = llama()
        model.model.layers[1].mlp.up_proj.weight.data *= 3e4
        model.model.layers[1].mlp.down_proj.weight.data *= 1e-4
        return model

    half = merged_case(huge(), LINEAR, tmp_path / "half").parity()
    assert half.verdict is Verdict.FAIL
    assert "exceeds float16's largest" in half.reason
    assert "layers.1.mlp" in half.reason
    assert "--dtype bfloat16" in half.hint
    whole = merged_case(huge(), LINEAR, tmp_path / "whole", dtype="float32").parity()
    assert whole.verdict is Verdict.PASS, whole.reason


def test_a_fresh_process_gives_what_this_one_gives(tmp_path: Path) -> None:
    from lora_deploy.evidence.reload import run_reloaded
    from tests.parity.conftest import run_here

    case = merged_case(llama(), LINEAR, tmp_path)
    architecture = architectures.find_architecture(case.plan.config)
    assert not isinstance(architecture, Absence)
    probes = make_probes(case.plan.config, architecture)
    fresh = run_reloaded(case.merged.root, architecture.name, probes)
    here = run_here(case.merged.root, architecture.name, probes)
    assert fresh.peak_bytes > 50_000_000
    for probe, outputs in here.outputs.items():
        assert outputs.keys() == fresh.outputs[probe].keys()
        assert all(torch.equal(value, fresh.outputs[probe][name]) for name, value in outputs.items())


def test_a_fresh_process_that_cannot_load_the_folder_fails_with_what_it_said(tmp_path: Path) -> None:
    from lora_deploy.errors import EvidenceError
    from lora_deploy.evidence.reload import run_reloaded

    with pytest.raises(EvidenceError, match="LlamaForCausalLM does not load"):
        run_reloaded(tmp_path, "LlamaForCausalLM", ())


def test_peft_reads_what_the_plan_merged_only_without_choices(tmp_path: Path) -> None:
    assert peer_reads(merged_case(llama(), LINEAR, tmp_path / "plain").plan)
    weighted = merged_case(llama(), LINEAR, tmp_path / "weighted", bind_options=BindOptions(weights=(2.0,)))
    assert not peer_reads(weighted.plan)


def test_the_report_is_plain_and_keeps_every_position(tmp_path: Path) -> None:
    report = merged_case(llama(), LINEAR, tmp_path).parity()
    assert isinstance(report, ParityReport)
    said = report.to_json()
    (subject,) = said["subjects"]
    probes = subject["probes"]
    assert {name.partition("/")[0] for name in probes} == set(said["probes"])
    assert all(len(entry["kl"]) == entry["n_positions"] for entry in probes.values())
    assert sum(entry["n_positions"] for entry in probes.values()) == subject["outputs"][0]["n_positions"]
    assert said["subjects"][0]["tolerances"][0]["shares"][0]["source"].endswith("3 seeds")
