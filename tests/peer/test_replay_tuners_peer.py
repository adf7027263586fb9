"""Healthy merges by PEFT 0.21.2 of its other tuners pass a replay; the bare base never does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lora_deploy import pipeline
from lora_deploy.evidence.options import VerifyOptions
from lora_deploy.evidence.verdict import Check, Verdict
from tests.peer.models import llama
from tests.peer.trained import peft_advice_unheard, save_base, train

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")
TARGETS = ["q_proj", "v_proj", "down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "Vera": {"r": 3},
    "RandLora": {"r": 3},
    "Miss": {"r": 4},
    "Miss bat": {"r": 4, "init_weights": "bat"},
    "C3A": {"block_size": 4},
    "FourierFT": {"n_frequency": 20},
    "WaveFT": {"n_frequency": 60},
    "VBLoRA": {"r": 2, "num_vectors": 9, "vector_length": 4},
    "Delora": {"r": 3},
    "Gralora": {"r": 4},
    "Shira": {"r": 1},
    "Supertuning": {"sparsity": 0.8},
    "TinyLora": {"r": 2, "u": 3},
    "UniLora": {"r": 2, "theta_d_length": 31},
    "Deft": {"r": 3},
    "Frod": {"progressbar": False, "sparse_rate": 0.05},
    "OSF": {},
    "Psoft": {"r": 3},
    "Peanut": {"r": 3, "depth": 1},
}
IN_FLOAT32_ONLY = {"C3A", "UniLora", "Frod", "OSF"}
"""In 16 bits the peer first rounds what they are made of: kernels before they are divided, scales, bases, parts."""
CASES = [
    pytest.param(kind, dtype, id=f"{kind}, {dtype}")
    for kind in KINDS
    for dtype in (torch.bfloat16, torch.float32)
    if dtype == torch.float32 or kind not in IN_FLOAT32_ONLY
]


def merged_by_peft(base: Path, adapter: Path, dtype: torch.dtype, out: Path) -> Path:
    with peft_advice_unheard():
        loaded: nn.Module = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        return save_base(peft.PeftModel.from_pretrained(loaded, adapter).merge_and_unload(), out)


def verdict(folder: Path, adapter: Path, base: Path) -> tuple[Verdict, Any]:
    options = VerifyOptions(only=(Check.REPLAY,))
    report = pipeline.verify(folder, adapters=[adapter], base=base, options=options).replay
    return report.verdict, report.faults


@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_a_tuner_merged_by_peft_passes_and_its_bare_base_fails(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    with peft_advice_unheard():
        config = getattr(peft, f"{kind.split(maxsplit=1)[0]}Config")(target_modules=TARGETS, **KINDS[kind])
    trained = train(llama(num_hidden_layers=1).to(dtype), config, tmp_path)
    merged = merged_by_peft(trained.base, trained.adapter, dtype, tmp_path / "merged")
    found, faults = verdict(merged, trained.adapter, trained.base)
    assert found is Verdict.PASS, faults
    assert verdict(trained.base, trained.adapter, trained.base)[0] is Verdict.FAIL
