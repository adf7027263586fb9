"""Healthy merges by PEFT 0.21.2, in all its modes, and by mergekit 0.1.5 pass a replay; the bare base never does.

Each case adapts a tiny model, moves every factor away from its start, lets the peer load, merge and save, and hands
folder, base and adapter to ``verify``. Whatever order the peer rounds in must be one that ``evidence/orders`` knows.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from lora_deploy import pipeline
from lora_deploy.evidence.options import VerifyOptions
from lora_deploy.evidence.outcome import Outcome
from lora_deploy.evidence.replay import ReplayReport
from lora_deploy.evidence.verdict import Check, Verdict
from lora_deploy.validate import BindOptions
from tests.peer.models import VOCABULARY, SelfAttention, bert, gpt2, gpt_neox, llama, llava, opt, t5, toy, vit, whisper
from tests.peer.trained import peft_advice_unheard, perturb, randomize, save_base

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
WIDE = {"hidden_size": 64, "intermediate_size": 96}


@dataclass(frozen=True)
class Mode:
    """How PEFT is asked to load and merge."""

    autocast: bool = True
    safe: bool = False
    low_memory: bool = False

    def __str__(self) -> str:
        parts = ["autocast" if self.autocast else "no autocast", "safe" if self.safe else "unsafe"]
        return ", ".join([*parts, "low memory"] if self.low_memory else parts)


MODES = [
    Mode(autocast=autocast, safe=safe, low_memory=low_memory)
    for autocast, low_memory in [(True, False), (False, False), (False, True)]
    for safe in (False, True)
]


@contextmanager
def quiet() -> Iterator[None]:
    with peft_advice_unheard():
        yield


def adapted(model: nn.Module, config: LoraConfig, folder: Path, dtype: torch.dtype = F32) -> Path:
    """Train an adapter on a copy of the model, as far as this goes, and save it in a dtype."""
    with quiet():
        trained = get_peft_model(copy.deepcopy(model).float(), config)
        perturb(trained)
        trained.save_pretrained(folder)
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    return folder


def merge_with_peft(loaded: nn.Module, adapters: list[Path], out: Path, mode: Mode) -> Path:
    options = {"autocast_adapter_dtype": mode.autocast, "low_cpu_mem_usage": mode.low_memory}
    with quiet():
        model = PeftModel.from_pretrained(loaded, adapters[0], adapter_name="a0", **options)
        for k, adapter in enumerate(adapters[1:], start=1):
            model.load_adapter(adapter, adapter_name=f"a{k}", **options)
        merged = model.merge_and_unload(safe_merge=mode.safe, adapter_names=[f"a{k}" for k in range(len(adapters))])
    return save_base(merged, out)


def replay(folder: Path, **arguments: Any) -> ReplayReport:
    report = pipeline.verify(folder, options=VerifyOptions(only=(Check.REPLAY,)), **arguments).replay
    assert isinstance(report, ReplayReport)
    return report


def assert_passes(report: ReplayReport) -> None:
    assert report.verdict is Verdict.PASS, report.faults
    assert any(entry.n_elements for entry in report.outcomes)


def assert_bare_base_fails(base: Path, adapters: list[Path]) -> None:
    report = replay(base, adapters=adapters, base=base)
    assert report.verdict is Verdict.FAIL
    assert Outcome.NOT_APPLIED in report.counts


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("adapter_dtype", [F32, BF16, F16], ids=lambda dtype: f"{dtype} adapter")
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=lambda dtype: f"{dtype} base")
def test_llama_merged_by_peft_passes(
    dtype: torch.dtype, adapter_dtype: torch.dtype, mode: Mode, tmp_path: Path
) -> None:
    model = llama(**WIDE, num_hidden_layers=1).to(dtype)
    base = save_base(model, tmp_path / "base")
    config = LoraConfig(r=5, lora_alpha=7, target_modules="all-linear")
    adapter = adapted(model, config, tmp_path / "adapter", adapter_dtype)
    merge_with_peft(model, [adapter], tmp_path / "merged", mode)
    assert_passes(replay(tmp_path / "merged", adapters=[adapter], base=base))


@pytest.mark.parametrize("loaded_in", [BF16, F16, F32], ids=lambda dtype: f"loaded in {dtype}")
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=lambda dtype: f"{dtype} base")
def test_a_base_that_was_loaded_in_another_dtype_passes(
    dtype: torch.dtype, loaded_in: torch.dtype, tmp_path: Path
) -> None:
    model = llama(**WIDE, num_hidden_layers=1).to(dtype)
    base = save_base(model, tmp_path / "base")
    adapter = adapted(model, LoraConfig(r=4, target_modules="all-linear"), tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=loaded_in)
    merge_with_peft(loaded, [adapter], tmp_path / "merged", Mode())
    assert_passes(replay(tmp_path / "merged", adapters=[adapter], base=base))
    assert_bare_base_fails(base, [adapter])


@pytest.mark.parametrize("stored", [BF16, F16, F32], ids=lambda dtype: f"stored in {dtype}")
@pytest.mark.parametrize("working", [BF16, F16, F32], ids=lambda dtype: f"merged in {dtype}")
def test_mergekits_way_of_merging_in_one_dtype_and_storing_in_another_passes(
    working: torch.dtype, stored: torch.dtype, tmp_path: Path
) -> None:
    """In mergekit 0.1.5, ``ModelReference.merged`` is PEFT's merge in one dtype; its own tasks cast to another."""
    model = llama(**WIDE, num_hidden_layers=1).to(BF16)
    base = save_base(model, tmp_path / "base")
    adapter = adapted(model, LoraConfig(r=4, lora_alpha=7, target_modules="all-linear"), tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=working)
    merge_with_peft(loaded, [adapter], tmp_path / "cached", Mode())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "cached", dtype=working).to(stored)
    assert_passes(replay(save_base(merged, tmp_path / "merged"), adapters=[adapter], base=base))


@dataclass(frozen=True)
class Variant:
    name: str
    options: dict[str, Any]
    make: Callable[[], nn.Module] = field(default=lambda: llama(**WIDE, num_hidden_layers=1))

    def __str__(self) -> str:
        return self.name


CONV1D = ["c_attn", "c_proj", "c_fc"]
VARIANTS = [
    Variant("rslora", {"target_modules": "all-linear", "use_rslora": True}),
    Variant("dora", {"target_modules": "all-linear", "use_dora": True}),
    Variant("bias", {"target_modules": CONV1D, "lora_bias": True}, gpt2),
    Variant("conv1d", {"target_modules": CONV1D}, gpt2),
    Variant("dora on conv1d", {"target_modules": CONV1D, "use_dora": True}, gpt2),
    Variant("embedding", {"target_modules": ["embed_tokens", "q_proj"]}),
    Variant("dora on embedding", {"target_modules": ["embed_tokens"], "use_dora": True}),
    Variant("trained head", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    Variant("trained tokens", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}),
    Variant(
        "patterns", {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}
    ),
    Variant("pissa", {"target_modules": ["q_proj", "up_proj"], "init_lora_weights": "pissa"}),
    Variant("olora", {"target_modules": ["q_proj", "up_proj"], "init_lora_weights": "olora"}),
    Variant("convolution", {"target_modules": ["m"]}, lambda: toy(m=nn.Conv2d(8, 16, 3))),
    Variant("dora on convolution", {"target_modules": ["m"], "use_dora": True}, lambda: toy(m=nn.Conv2d(8, 16, 3))),
    Variant("attention", {"target_modules": ["attn"]}, lambda: toy(m=SelfAttention())),
]


@pytest.mark.parametrize("mode", [Mode(), Mode(autocast=False)], ids=str)
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_variant_merged_by_peft_passes(variant: Variant, dtype: torch.dtype, mode: Mode, tmp_path: Path) -> None:
    model = variant.make().to(dtype)
    base = save_base(model, tmp_path / "base")
    adapter = adapted(model, LoraConfig(r=3, lora_alpha=5, **variant.options), tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=dtype) if isinstance(model, PreTrainedModel) else model
    merge_with_peft(loaded, [adapter], tmp_path / "merged", mode)
    assert_passes(replay(tmp_path / "merged", adapters=[adapter], base=base))
    assert replay(base, adapters=[adapter], base=base).verdict is Verdict.FAIL


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_two_adapters_merged_by_peft_one_after_the_other_pass(dtype: torch.dtype, tmp_path: Path) -> None:
    model = llama(**WIDE, num_hidden_layers=1).to(dtype)
    base = save_base(model, tmp_path / "base")
    adapters = [
        adapted(model, LoraConfig(r=r, target_modules=["q_proj", "up_proj"]), tmp_path / f"adapter{r}") for r in (2, 3)
    ]
    merge_with_peft(model, adapters, tmp_path / "merged", Mode())
    assert_passes(
        replay(tmp_path / "merged", adapters=adapters, base=base, bind_options=BindOptions(weights=(1.0, 1.0)))
    )


def test_a_tied_model_that_peft_merged_is_reported_as_not_untied(tmp_path: Path) -> None:
    """PEFT adapts one side in the forward pass and both in the merge: its merged model is another one."""
    model = llama(**WIDE, num_hidden_layers=1, tie_word_embeddings=True)
    base = save_base(model, tmp_path / "base")
    adapter = adapted(model, LoraConfig(r=3, target_modules=["lm_head", "q_proj"]), tmp_path / "adapter")
    with pytest.warns(UserWarning, match="tied"):
        merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    save_base(merged, tmp_path / "merged")
    report = replay(tmp_path / "merged", adapters=[adapter], base=base)
    found = {entry.name: entry for entry in report.outcomes}
    assert report.verdict is Verdict.FAIL
    assert found["model.embed_tokens.weight"].outcome is Outcome.CHANGED
    assert "not untied" in found["model.embed_tokens.weight"].message
    assert found["config.json:tie_word_embeddings"].outcome is Outcome.WRONG_CONFIG
    assert found["model.layers.0.self_attn.q_proj.weight"].outcome.is_sound


_MERGEKIT = """
import json, sys
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
for case in json.load(open(sys.argv[1])):
    config = {"models": [{"model": case["base"] + "+" + case["adapter"]}], "merge_method": "passthrough"}
    options = MergeOptions(lora_merge_cache=case["cache"], lora_merge_dtype=case["working"], copy_tokenizer=False)
    run_merge(MergeConfiguration.model_validate(config | {"dtype": case["stored"]}), case["out"], options)
"""


@pytest.mark.skipif(find_spec("mergekit") is None, reason="needs mergekit: pip install --no-deps mergekit immutables")
def test_merges_by_mergekit_itself_pass_whatever_dtype_it_loads_and_stores(tmp_path: Path) -> None:
    model = llama(**WIDE, num_hidden_layers=1).to(BF16)
    base = save_base(model, tmp_path / "base")
    adapter = adapted(model, LoraConfig(r=4, lora_alpha=7, target_modules="all-linear"), tmp_path / "adapter")
    cases = [
        {"working": working, "stored": stored, "out": str(tmp_path / f"{working}-{stored}")}
        for working in (None, "float16", "bfloat16", "float32")
        for stored in ("float16", "bfloat16", "float32")
    ]
    for k, case in enumerate(cases):
        case |= {"base": str(base), "adapter": str(adapter), "cache": str(tmp_path / f"cache{k}")}
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "-W", "ignore", "-c", _MERGEKIT, str(tmp_path / "cases.json")]
    subprocess.run(command, check=True, env=os.environ, capture_output=True)
    for case in cases:
        assert_passes(replay(case["out"], adapters=[adapter], base=base))


def mixtral() -> nn.Module:
    """Experts in one tensor in memory, in many on disk."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2}
    return randomize(MixtralForCausalLM(MixtralConfig(**sizes, **heads)))


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ARCHITECTURES = [
    Variant("mixtral", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}, mixtral),
    Variant("tied llama", {"target_modules": "all-linear"}, lambda: llama(tie_word_embeddings=True)),
    Variant("gpt2", {"target_modules": CONV1D}, gpt2),
    Variant("gpt_neox", {"target_modules": "all-linear"}, gpt_neox),
    Variant("opt", {"target_modules": ["q_proj", "out_proj", "fc1"]}, opt),
    Variant("t5", {"target_modules": ["q", "v", "wi"]}, t5),
    Variant("bert", {"target_modules": ["query", "dense"]}, bert),
    Variant("vit", {"target_modules": ["q_proj", "fc1"]}, vit),
    Variant("whisper", {"target_modules": ["q_proj", "out_proj"]}, whisper),
    Variant("llava", {"target_modules": ["q_proj", "up_proj", "linear_1"]}, llava),
]


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("variant", ARCHITECTURES, ids=str)
def test_every_architectures_own_names_and_shared_tensors_are_found(
    variant: Variant, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = variant.make().to(dtype)
    base = save_base(model, tmp_path / "base")
    adapter = adapted(model, LoraConfig(r=3, **variant.options), tmp_path / "adapter")
    merge_with_peft(type(model).from_pretrained(base, dtype=dtype), [adapter], tmp_path / "merged", Mode())
    assert_passes(replay(tmp_path / "merged", adapters=[adapter], base=base))
    assert_bare_base_fails(base, [adapter])


def test_a_state_dict_in_the_names_of_memory_passes(tmp_path: Path) -> None:
    """What ``torch.save`` of a merged model holds: other names than the base's file has."""
    model = llava().to(BF16)
    base = save_base(model, tmp_path / "base")
    adapter = adapted(model, LoraConfig(r=3, target_modules=["q_proj"]), tmp_path / "adapter")
    with quiet():
        merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    (tmp_path / "merged").mkdir()
    torch.save(merged.state_dict(), tmp_path / "merged" / "pytorch_model.bin")
    assert_passes(replay(tmp_path / "merged", adapters=[adapter], base=base))
