"""Adapters that no peer loads from their files here: run on activations from what was read, and the report says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_deploy.adapters.open import read_adapter
from lora_deploy.bases import open_base
from lora_deploy.checkpoint import open_checkpoint
from lora_deploy.evidence.parity import check_parity
from lora_deploy.evidence.parity_report import ParityReport
from lora_deploy.evidence.verdict import Verdict
from lora_deploy.merge.execute import execute
from lora_deploy.merge.options import MergeOptions
from lora_deploy.merge.plan import plan_merge
from lora_deploy.validate import bind
from tests.peer.models import llama
from tests.peer.trained import MEMORY_BYTES, save_base

pytestmark = pytest.mark.usefixtures("in_one_process")


@pytest.mark.parametrize("is_tied", [False, True], ids=["linear layers", "and a tied embedding"])
def test_an_adapter_of_mlx_is_verified_by_its_factors_and_says_that_it_shares_our_reader(
    is_tied: bool, tmp_path: Path
) -> None:
    model = llama(tie_word_embeddings=is_tied)
    base = save_base(model, tmp_path / "base")
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    tensors = {}
    for name in names:
        n_out, n_in = model.get_submodule(name).weight.shape
        tensors |= {f"{name}.lora_a": torch.randn(n_in, 3) * 0.1, f"{name}.lora_b": torch.randn(3, n_out) * 0.1}
    if is_tied:
        n_tokens, dim = model.get_submodule("model.embed_tokens").weight.shape
        pair = {"lora_a": torch.randn(n_tokens, 3) * 0.05, "lora_b": torch.randn(3, dim) * 0.05}
        tensors |= {f"model.embed_tokens.{slot}": values for slot, values in pair.items()}
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(tensors, folder / "adapters.safetensors")
    told = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 3, "scale": 2.0}}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    options = MergeOptions(dtype="float16", n_workers=1, memory_bytes=MEMORY_BYTES)
    plan = plan_merge(bind([read_adapter(folder)], open_base(str(base))), options)
    merged = execute(plan, tmp_path / "merged")
    report = check_parity(plan, open_checkpoint(merged.root))
    assert isinstance(report, ParityReport)
    assert report.verdict is Verdict.PASS, report.reason
    assert not report.is_independent
    assert "shares our reader" in report.reference
    bare = check_parity(plan, plan.binding.checkpoint)
    assert isinstance(bare, ParityReport)
    assert bare.verdict is Verdict.FAIL
