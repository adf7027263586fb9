"""Quantised bases are unpacked to what transformers 5.23 unpacks: FP8 and MXFP4."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from lora_deploy.bases import open_base
from tests.peer.trained import tensors_of


@pytest.mark.parametrize("shape", [(2, 2), (1, 1), (4, 8), (8, 1)])
def test_fp8_is_unpacked_to_what_transformers_5_23_unpacks(shape: tuple[int, int], tmp_path: Path) -> None:
    weight, scale = torch.randn(8, 16).to(torch.float8_e4m3fn), torch.rand(shape) + 0.1
    (tmp_path / "config.json").write_text('{"dtype": "float32", "quantization_config": {"quant_method": "fp8"}}')
    save_file({"a.weight": weight, "a.weight_scale_inv": scale}, tmp_path / "model.safetensors")
    found = tensors_of(open_base(str(tmp_path), dequantize=True).root)["a.weight"]
    expected = Fp8Dequantize(None).convert({"weight": weight, "weight_scale_inv": scale})["weight"]
    assert torch.equal(found, expected)


def test_mxfp4_is_unpacked_to_what_transformers_5_23_unpacks(tmp_path: Path) -> None:
    blocks = torch.randint(0, 256, (2, 6, 3, 16), dtype=torch.uint8)
    scales = torch.randint(90, 150, (2, 6, 3), dtype=torch.uint8)
    name = "model.layers.0.mlp.experts.down_proj"
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "mxfp4"}}')
    save_file({f"{name}_blocks": blocks, f"{name}_scales": scales}, tmp_path / "model.safetensors")
    found = tensors_of(open_base(str(tmp_path), dequantize=True).root)[name]
    assert torch.equal(found, convert_moe_packed_tensors(blocks, scales))
