"""Packed bases are refused by method, with the 16-bit original where its name tells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lora_deploy.bases import open_base
from lora_deploy.bases.quantised import sixteen_bit_original
from lora_deploy.errors import InputError
from tests.builders import make_checkpoint

PLAIN = torch.zeros(4, 4, dtype=torch.bfloat16)
PACKED = torch.zeros(4, 4, dtype=torch.uint8)
X = "model.layers.0.mlp.up_proj"

METHODS: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any], str]] = {
    "declared bitsandbytes": (
        {f"{X}.weight": PLAIN},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        "bitsandbytes",
    ),
    "declared without method": (
        {f"{X}.weight": PLAIN},
        {"quantization_config": {"load_in_8bit": True}},
        "bitsandbytes",
    ),
    "declared FP8": ({f"{X}.weight": PLAIN}, {"quantization_config": {"quant_method": "fp8"}}, "fp8"),
    "declared for the text model": (
        {f"{X}.weight": PLAIN},
        {"text_config": {"quantization_config": {"quant_method": "awq"}}},
        "awq",
    ),
    "declared by MLX": ({f"{X}.weight": PLAIN}, {"quantization": {"group_size": 64, "bits": 4}}, "MLX"),
    "bitsandbytes names": ({f"{X}.weight": PACKED, f"{X}.weight.absmax": torch.zeros(1)}, {}, "bitsandbytes"),
    "8-bit bitsandbytes names": ({f"{X}.weight": PLAIN, f"{X}.SCB": torch.zeros(1)}, {}, "bitsandbytes"),
    "declared act-order": ({f"{X}.weight": PLAIN}, {"quantization_config": {"quant_method": "gptq"}}, "gptq"),
    "GPTQ names": ({f"{X}.qweight": PACKED.to(torch.int32), f"{X}.qzeros": PACKED}, {}, "GPTQ or AWQ"),
    "MXFP4 names": ({"experts.gate_up_proj_blocks": PACKED, "experts.gate_up_proj_scales": PACKED}, {}, "MXFP4"),
    "compressed-tensors names": ({f"{X}.weight_packed": PACKED.to(torch.int32)}, {}, "compressed-tensors"),
    "FP8 names": ({f"{X}.weight": PLAIN, f"{X}.weight_scale_inv": torch.zeros(1)}, {}, "FP8"),
    "FP8 dtype": ({f"{X}.weight": PLAIN.to(torch.float8_e4m3fn)}, {}, "F8_E4M3 weights"),
    "MLX names": ({f"{X}.weight": PACKED.to(torch.uint32), f"{X}.scales": PLAIN, f"{X}.biases": PLAIN}, {}, "MLX"),
}


@pytest.mark.parametrize(("tensors", "config", "method"), METHODS.values(), ids=METHODS)
def test_packed_weights_are_refused_by_method(
    tmp_path: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any], method: str
) -> None:
    make_checkpoint(tmp_path / "Tiny-1B-GPTQ-Int4", tensors, config)
    with pytest.raises(InputError, match=rf"quantised \({method}\)") as caught:
        open_base(str(tmp_path / "Tiny-1B-GPTQ-Int4"))
    assert caught.value.code == "quantised-base"
    original, _, other = str(caught.value.hint).partition(",")
    assert original.endswith("Tiny-1B")
    assert ("--dequantize" in other) == (method != "GPTQ or AWQ")


def test_a_packing_that_is_not_known_is_refused_by_name_although_it_is_to_be_dequantised(tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "hqq"}}
    make_checkpoint(tmp_path / "Tiny-1B-4bit", {f"{X}.weight": PLAIN}, config)
    with pytest.raises(InputError, match=r"\(hqq\): cannot be dequantised: known are bitsandbytes, gptq") as caught:
        open_base(str(tmp_path / "Tiny-1B-4bit"), dequantize=True)
    assert str(caught.value.hint).endswith("Tiny-1B")


def test_integers_that_are_no_weights_are_no_sign_of_packing(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, {f"{X}.weight": PLAIN, "position_ids": torch.arange(4), "mask": PACKED}, {})
    assert open_base(str(tmp_path)).tensors


@pytest.mark.parametrize(
    ("name", "original"),
    [
        ("unsloth/Llama-3.2-1B-bnb-4bit", "unsloth/Llama-3.2-1B"),
        ("unsloth/Qwen2.5-7B-Instruct-unsloth-bnb-4bit", "unsloth/Qwen2.5-7B-Instruct"),
        ("TheBloke/Mistral-7B-v0.1-GPTQ", "TheBloke/Mistral-7B-v0.1"),
        ("Qwen/Qwen2-7B-Instruct-GPTQ-Int4", "Qwen/Qwen2-7B-Instruct"),
        ("TheBloke/zephyr-7B-beta-AWQ", "TheBloke/zephyr-7B-beta"),
        ("mlx-community/Llama-3.2-3B-Instruct-4bit", "mlx-community/Llama-3.2-3B-Instruct"),
        ("neuralmagic/Meta-Llama-3-8B-FP8", "neuralmagic/Meta-Llama-3-8B"),
        ("RedHatAI/Qwen3-8B-quantized.w4a16", "RedHatAI/Qwen3-8B"),
        ("/models/gemma-2b-bnb-8bit/", "/models/gemma-2b"),
        ("meta-llama/Llama-3.2-1B", None),
        ("owner/bitnet-1bit-model", None),
    ],
)
def test_the_original_is_the_name_without_its_suffix(name: str, original: str | None) -> None:
    assert sixteen_bit_original(name) == original
