"""Bases that bitsandbytes 0.50 packs: unpacked to what it unpacks itself, merged to what training on them saw."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

from lora_deploy.bases import open_base
from lora_deploy.evidence.options import VerifyOptions
from lora_deploy.evidence.verdict import Check, Verdict
from lora_deploy.merge.options import MergeOptions
from lora_deploy.pipeline import merge, verify
from tests.peer.models import llama, token_ids
from tests.peer.trained import MEMORY_BYTES, forward, peft_advice_unheard, perturb, save_base, tensors_of

bitsandbytes = pytest.importorskip("bitsandbytes", reason="the oracle of its own packings")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A llama wide enough to have several blocks, in a format.

    Its rows are whole blocks: bitsandbytes 0.50 unpacks others wrongly itself on processors with AVX-512, where it
    starts a block anew in each row (``test_blocks_run_on_from_row_to_row`` has those).
    """
    model = llama(hidden_size=64, intermediate_size=128)
    folder = tmp_path_factory.mktemp("plain")
    return lambda dtype: save_base(model.to(getattr(torch, dtype)), folder / dtype)


PACKINGS: dict[str, dict[str, Any]] = {
    f"{kind}{', nested' * nested}": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": nested,
    }
    for kind in ("nf4", "fp4")
    for nested in (False, True)
} | {"int8": {"load_in_8bit": True}}


def quantised(base: Path, folder: Path, dtype: str, options: dict[str, Any]) -> LlamaForCausalLM:
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(**options, bnb_4bit_compute_dtype="float32")
    model = LlamaForCausalLM.from_pretrained(
        base, quantization_config=config, device_map="cpu", dtype=getattr(torch, dtype)
    )
    model.save_pretrained(folder)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # that kernel, of inference alone, rounds activations to bfloat16
    return model.eval()


def unpacked_by_the_peer(module: torch.nn.Module) -> Tensor:
    weight = module.weight
    if hasattr(weight, "quant_state"):
        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    scales = weight.SCB if weight.SCB is not None else module.state.SCB
    return bitsandbytes.functional.int8_vectorwise_dequant(weight.data, scales)


@pytest.mark.parametrize("options", PACKINGS.values(), ids=PACKINGS)
def test_a_packing_of_bitsandbytes_is_unpacked_to_what_it_unpacks_itself(
    options: dict[str, Any], plain: Callable[[str], Path], tmp_path: Path
) -> None:
    model = quantised(plain("float32"), tmp_path / "packed", "float32", options)
    base = open_base(str(tmp_path / "packed"), dequantize=True)
    found = tensors_of(base.root)
    assert set(found) == set(load_file(plain("float32") / "model.safetensors"))
    packed = {n: m for n, m in model.named_modules() if type(m).__module__.startswith("bitsandbytes")}
    assert len(packed) == 14
    for name, module in packed.items():
        expected = unpacked_by_the_peer(module)
        assert expected.dtype == found[f"{name}.weight"].dtype == torch.float32
        noise = 2.0**-22 if "load_in_8bit" in options else 0.0  # there it multiplies twice in float32, we divide once
        assert ((found[f"{name}.weight"] - expected).abs() <= noise * expected.abs()).all(), name
    assert "quantization_config" not in json.loads((base.root / "config.json").read_text())


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_blocks_run_on_from_row_to_row(kind: str, tmp_path: Path) -> None:
    """Codes times maxima, block by block through the whole matrix, as they were packed: 96 columns, blocks of 64."""
    base = save_base(llama(hidden_size=64, intermediate_size=96), tmp_path / "plain")
    model = quantised(base, tmp_path / "packed", "float32", PACKINGS[kind])
    found = tensors_of(open_base(str(tmp_path / "packed"), dequantize=True).root)
    weight = model.model.layers[0].mlp.down_proj.weight
    packed = weight.data.flatten()
    codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten().long()
    blocks = weight.quant_state.code[codes].reshape(-1, 64) * weight.quant_state.absmax[:, None]
    assert torch.equal(found["model.layers.0.mlp.down_proj.weight"], blocks.reshape(64, 96))


@pytest.mark.parametrize("kind", ["nf4, nested", "fp4"])
def test_a_merge_into_an_unpacked_base_computes_what_peft_0_21_2_trained_on_the_packed_one(
    kind: str, plain: Callable[[str], Path], tmp_path: Path
) -> None:
    """Not int8: its forward pass rounds activations to eight bits too, which no weights can say."""
    model = quantised(plain("float32"), tmp_path / "packed", "float32", PACKINGS[kind])
    inputs = token_ids()
    before = forward(model, inputs)
    with peft_advice_unheard():
        trained = get_peft_model(model, LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"]))
        perturb(trained)
        trained.eval().save_pretrained(tmp_path / "adapter")
    expected = forward(trained, inputs)
    out = tmp_path / "out"
    how = MergeOptions(dtype="float32", n_workers=1, memory_bytes=MEMORY_BYTES)
    merge(tmp_path / "adapter", base=tmp_path / "packed", output=out, dequantize=True, merge_options=how)
    merged = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)
    output = forward(merged, inputs)
    size = (expected - before).abs().max()
    assert size > 0.1
    assert (output - expected).abs().max() <= 1e-4 * size
    found = verify(out, options=VerifyOptions(only=(Check.REPLAY,)), merge_options=how)
    assert found.verdict is Verdict.PASS
