"""A configuration is a stranger's JSON: whatever it holds in place of a number or a name, the answer is one of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_deploy.errors import InputError
from tests.unit.bases.quantisations import test_awq, test_compressed_tensors, test_gptq, test_mlx
from tests.unit.bases.quantisations.unpacked import LAYER, unpacked

FP8 = {
    f"{LAYER}.weight": torch.ones(4, 8).to(torch.float8_e4m3fn),
    f"{LAYER}.weight_scale_inv": torch.ones(2, 3),
}
PACKED: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {
    "gptq": (test_gptq.packed(*test_gptq.drawn(4), 4), test_gptq.settings(4)),
    "awq": (test_awq.drawn()[0], test_awq.SETTINGS),
    "fp8": (FP8, {"quant_method": "fp8", "weight_block_size": [2, 3]}),
    "compressed-tensors": (test_compressed_tensors.drawn(4, zeros=False)[0], test_compressed_tensors.settings()),
    "mlx": (test_mlx.drawn(4)[0], {"quant_method": "MLX", "bits": 4, "group_size": 32}),
}
FIELDS = {
    "gptq": ["bits", "group_size", "checkpoint_format", "pack_dtype"],
    "awq": ["bits", "group_size", "version", "zero_point"],
    "fp8": ["weight_block_size"],
    "compressed-tensors": ["format", "config_groups"],
    "mlx": ["bits", "group_size", "mode"],
}
ODD: list[Any] = [[[1], [2]], {"a": [1]}, "odd", 1e300, [-1, 0], [128]]


@pytest.mark.parametrize("value", ODD, ids=repr)
@pytest.mark.parametrize(("method", "field"), [(m, field) for m, fields in FIELDS.items() for field in fields])
def test_a_setting_of_another_type_is_an_input_error(method: str, field: str, value: Any, tmp_path: Path) -> None:
    tensors, settings = PACKED[method]
    with pytest.raises(InputError):
        unpacked(tmp_path, tensors, settings | {field: value})


@pytest.mark.parametrize("value", ODD, ids=repr)
@pytest.mark.parametrize("field", ["num_bits", "weights"])
def test_a_scheme_of_another_type_is_an_input_error(field: str, value: Any, tmp_path: Path) -> None:
    tensors, settings = PACKED["compressed-tensors"]
    weights = settings["config_groups"]["group_0"]["weights"]
    group = {"weights": value} if field == "weights" else {"weights": weights | {field: value}}
    with pytest.raises(InputError):
        unpacked(tmp_path, tensors, settings | {"config_groups": {"group_0": group}})


@pytest.mark.parametrize("method", PACKED)
def test_without_the_odd_value_each_of_them_is_unpacked(method: str, tmp_path: Path) -> None:
    assert f"{LAYER}.weight" in unpacked(tmp_path, *PACKED[method]).tensors
