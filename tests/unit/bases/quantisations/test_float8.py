"""FP8 weights come back as stored number times scale, whatever shares a scale and whatever it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_deploy.errors import InputError, MalformedCheckpointError
from tests.unit.bases.quantisations.unpacked import LAYER, tensor_of, unpacked

NAME = f"{LAYER}.weight"
FP8 = {"quant_method": "fp8", "weight_block_size": [4, 8]}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}},
}


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape).to(torch.float8_e4m3fn)


def in_blocks(weight: Tensor, scale: Tensor, rows: int, columns: int) -> Tensor:
    """Repeat every scale over its block, cut what stands over, multiply."""
    full = scale.double().repeat_interleave(rows, -2).repeat_interleave(columns, -1)
    return weight.double() * full[..., : weight.shape[-2], : weight.shape[-1]]


SCALES: dict[str, tuple[dict[str, Any] | None, str, tuple[int, ...], tuple[int, int]]] = {
    "a tensor": ({"quant_method": "fp8"}, "weight_scale", (), (12, 16)),
    "a tensor, as a vector of one": ({"quant_method": "fp8"}, "weight_scale_inv", (1,), (12, 16)),
    "a channel": (COMPRESSED, "weight_scale", (12, 1), (1, 16)),
    "a channel, as a vector": ({"quant_method": "fbgemm_fp8"}, "weight_scale", (12,), (1, 16)),
    "a block": (FP8, "weight_scale_inv", (3, 2), (4, 8)),
    "a block, and the configuration does not say": ({"quant_method": "fp8"}, "weight_scale_inv", (3, 2), (4, 8)),
    "a group of inputs": ({"quant_method": "fp8"}, "weight_scale", (12, 4), (1, 4)),
    "nothing is declared": (None, "weight_scale", (12, 1), (1, 16)),
}


@pytest.mark.parametrize(("settings", "scale_name", "shape", "block"), SCALES.values(), ids=SCALES)
def test_a_scale_multiplies_what_it_stands_for(
    settings: dict[str, Any] | None,
    scale_name: str,
    shape: tuple[int, ...],
    block: tuple[int, int],
    tmp_path: Path,
) -> None:
    weight, scale = drawn(12, 16), torch.rand(shape) + 0.1
    tensors = {NAME: weight, f"{LAYER}.{scale_name}": scale, f"{LAYER}.input_scale": torch.ones(1)}
    base = unpacked(tmp_path, tensors, settings, torch_dtype="float32")
    assert list(base.tensors) == [NAME]
    grid = scale.reshape(-1, 1) if scale.ndim < 2 else scale
    assert torch.equal(tensor_of(base, NAME), in_blocks(weight, grid, *block).float())
    assert [finding.code for finding in base.findings] == ["dequantised-base"]
    assert "input_scale" in base.findings[0].message


@pytest.mark.parametrize("n_rows", [1, 3, 7])
def test_it_does_not_matter_how_few_rows_are_unpacked_at_once(
    n_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_deploy.bases.dequantise._BLOCK_ELEMENTS", n_rows * 16)
    weight, scale = drawn(12, 16), torch.rand(3, 2)
    base = unpacked(tmp_path, {NAME: weight, f"{NAME}_scale_inv": scale}, FP8, dtype="float32")
    assert torch.equal(tensor_of(base, NAME), in_blocks(weight, scale, 4, 8).float())


def test_a_last_block_may_stand_over_the_edge(tmp_path: Path) -> None:
    weight, scale = drawn(10, 19), torch.rand(3, 3)
    base = unpacked(tmp_path, {NAME: weight, f"{NAME}_scale_inv": scale}, FP8, dtype="float32")
    assert torch.equal(tensor_of(base, NAME), in_blocks(weight, scale, 4, 8).float())


@pytest.mark.parametrize("shape", [(3, 1, 1), (3, 1, 16), (3, 12, 1), (3, 3, 2), (3,)])
def test_a_stack_of_experts_has_scales_of_its_own(shape: tuple[int, ...], tmp_path: Path) -> None:
    weight, scale = drawn(3, 12, 16), torch.rand(shape) + 0.1
    name = "model.layers.0.mlp.experts.gate_up_proj"
    base = unpacked(tmp_path, {name: weight, f"{name}_scale": scale}, FP8, dtype="float32")
    grid = scale.reshape(3, 1, 1) if len(shape) == 1 else scale
    block = 12 // grid.shape[1], 16 // grid.shape[2]
    assert torch.equal(tensor_of(base, name), in_blocks(weight, grid, *block).float())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu])
def test_a_scale_may_be_an_exponent_alone(dtype: torch.dtype, tmp_path: Path) -> None:
    weight = drawn(4, 8)
    scale = torch.tensor([[130]], dtype=torch.uint8).view(dtype)
    base = unpacked(tmp_path, {NAME: weight, f"{NAME}_scale_inv": scale}, FP8, dtype="float32")
    assert torch.equal(tensor_of(base, NAME), weight.float() * 8)


def test_numbers_in_eight_bits_without_any_scale_are_what_they_are(tmp_path: Path) -> None:
    weight = torch.randn(4, 8).to(torch.float8_e5m2)
    base = unpacked(tmp_path, {NAME: weight}, None)
    assert tensor_of(base, NAME).dtype == torch.bfloat16
    assert torch.equal(tensor_of(base, NAME).float(), weight.float())


def test_a_lost_scale_is_malformed(tmp_path: Path) -> None:
    with pytest.raises(MalformedCheckpointError, match="is in FP8 and has no scale"):
        unpacked(tmp_path, {NAME: drawn(4, 8)}, FP8)


@pytest.mark.parametrize("shape", [(5, 1), (2, 3), (3, 2, 1), (4,)])
def test_a_scale_that_fits_no_blocks_is_malformed(shape: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(MalformedCheckpointError, match=r"weight_scale_inv: found shape"):
        unpacked(tmp_path, {NAME: drawn(12, 16), f"{NAME}_scale_inv": torch.rand(shape)}, FP8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (COMPRESSED | {"format": "nvfp4-pack-quantized"}, "compressed-tensors in the format 'nvfp4-pack-quantized'"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt 'NVFP4'"),
    ],
)
def test_other_forms_of_the_same_method_are_refused_by_name(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        unpacked(tmp_path, {NAME: drawn(4, 8), f"{NAME}_scale": torch.ones(1)}, settings)


def test_what_another_quantisation_packed_beside_it_is_refused(tmp_path: Path) -> None:
    tensors = {NAME: drawn(4, 8), f"{NAME}_scale": torch.ones(1), "b.weight": torch.zeros(4, 4, dtype=torch.uint8)}
    with pytest.raises(InputError, match="fp8, and beside it U8 weights"):
        unpacked(tmp_path, tensors, FP8)


def test_a_weight_that_its_format_cannot_hold_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    tensors = {NAME: torch.full((4, 8), 400.0).to(torch.float8_e4m3fn), f"{NAME}_scale": torch.full((1,), 1000.0)}
    with pytest.raises(MalformedCheckpointError, match="holds what is no finite float16"):
        unpacked(tmp_path, tensors, FP8, dtype="float16")
