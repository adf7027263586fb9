"""bitsandbytes tensors, packed here from the published layout, come back as code value · block maximum."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_deploy.errors import InputError, MalformedCheckpointError
from tests.unit.bases.quantisations.unpacked import LAYER, tensor_of, unpacked

NAME = f"{LAYER}.weight"
SETTINGS = {"quant_method": "bitsandbytes", "load_in_4bit": True}
VALUES = torch.linspace(-1, 1, 16)


def state(**fields: Any) -> Tensor:
    whole = {"quant_type": "nf4", "blocksize": 4, "dtype": "float32", "shape": [3, 5], **fields}
    return torch.frombuffer(bytearray(json.dumps(whole).encode()), dtype=torch.uint8)


def drawn(shape: tuple[int, ...] = (3, 5), **fields: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Pack two codes a byte, the first in the high half; every four elements share a maximum."""
    n = torch.Size(shape).numel()
    codes, maxima = torch.randint(0, 16, (n,)), torch.rand(-(-n // 4)) + 0.5
    padded = torch.cat((codes, torch.zeros(n % 2, dtype=torch.int64)))
    tensors = {
        NAME: (padded[0::2] << 4 | padded[1::2]).to(torch.uint8).reshape(-1, 1),
        f"{NAME}.absmax": maxima,
        f"{NAME}.quant_map": VALUES,
        f"{NAME}.quant_state.bitsandbytes__nf4": state(shape=list(shape), **fields),
    }
    exact = VALUES.double()[codes] * maxima.double()[torch.arange(n) // 4]
    return tensors, exact.reshape(shape)


@pytest.mark.parametrize("n_elements", [1, 7, 1 << 20])
@pytest.mark.parametrize("shape", [(3, 5), (4, 8), (2, 3, 5)])
def test_four_bits_are_unpacked_however_blocks_rows_and_bytes_lie(
    shape: tuple[int, ...], n_elements: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_deploy.bases.dequantise._BLOCK_ELEMENTS", n_elements)
    tensors, exact = drawn(shape)
    base = unpacked(tmp_path, tensors, SETTINGS)
    assert list(base.tensors) == [NAME]
    assert torch.equal(tensor_of(base, NAME), exact.float())


def test_codes_may_be_stored_in_elements_of_another_type(tmp_path: Path) -> None:
    tensors, exact = drawn((4, 8))
    tensors[NAME] = tensors[NAME].reshape(-1).view(torch.bfloat16).reshape(-1, 1)
    assert torch.equal(tensor_of(unpacked(tmp_path, tensors, SETTINGS), NAME), exact.float())


def test_maxima_that_are_quantised_again_are_unpacked_in_float32(tmp_path: Path) -> None:
    tensors, _ = drawn(nested_blocksize=3, nested_dtype="float32", nested_offset=0.1)
    codes, values, scales = torch.tensor([0, 7, 255, 9], dtype=torch.uint8), torch.rand(256), torch.tensor([2.0, 3.0])
    tensors |= {f"{NAME}.absmax": codes, f"{NAME}.nested_quant_map": values, f"{NAME}.nested_absmax": scales}
    maxima = values[codes.int()] * scales[[0, 0, 0, 1]] + torch.tensor(0.1)
    packed = tensors[NAME].reshape(-1)
    code = torch.stack((packed >> 4, packed & 15), 1).reshape(-1)[:15]
    exact = VALUES.double()[code.int()] * maxima.double()[torch.arange(15) // 4]
    assert torch.equal(tensor_of(unpacked(tmp_path, tensors, SETTINGS), NAME), exact.reshape(3, 5).float())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_format_that_the_packing_names_wins_over_the_configurations(dtype: str, tmp_path: Path) -> None:
    tensors, exact = drawn(dtype=dtype)
    base = unpacked(tmp_path, tensors, SETTINGS, dtype="float64")
    assert tensor_of(base, NAME).dtype == getattr(torch, dtype)
    assert torch.equal(tensor_of(base, NAME), exact.float().to(getattr(torch, dtype)))


def test_eight_bits_are_rows_times_their_maximum_over_127(tmp_path: Path) -> None:
    weight = torch.tensor([[127, -64, 1], [0, 127, -127]], dtype=torch.int8)
    scales = torch.tensor([2.54, 1.27])
    tensors = {NAME: weight, f"{LAYER}.SCB": scales, f"{LAYER}.weight_format": torch.tensor(0, dtype=torch.uint8)}
    base = unpacked(tmp_path, tensors, {"load_in_8bit": True}, dtype="float32")
    assert list(base.tensors) == [NAME]
    assert torch.allclose(tensor_of(base, NAME), torch.tensor([[2.54, -1.28, 0.02], [0, 1.27, -1.27]]))


def test_eight_bits_in_a_layout_for_one_gpu_are_refused_by_name(tmp_path: Path) -> None:
    tensors = {
        NAME: torch.ones(2, 3, dtype=torch.int8),
        f"{LAYER}.SCB": torch.ones(2),
        f"{LAYER}.weight_format": torch.tensor(2, dtype=torch.uint8),
    }
    with pytest.raises(InputError, match="int8 in a layout for one GPU generation"):
        unpacked(tmp_path, tensors, SETTINGS)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"quant_type": "int5"}, InputError, "bitsandbytes type 'int5'"),
        ({"dtype": "float8"}, InputError, "was made from float8"),
        ({"shape": [3, -5]}, MalformedCheckpointError, "is no quantisation state"),
        ({"shape": "3x5"}, MalformedCheckpointError, "is no quantisation state"),
        ({"shape": [30, 50]}, MalformedCheckpointError, r"absmax: found shape \(4,\), expected \(375,\)"),
        ({"blocksize": 0}, MalformedCheckpointError, "is no quantisation state"),
        ({"nested_blocksize": 256}, MalformedCheckpointError, "has no .*nested_absmax"),
    ],
)
def test_a_state_that_cannot_be_obeyed_is_refused(
    fields: dict[str, Any], error: type[InputError], message: str, tmp_path: Path
) -> None:
    tensors, _ = drawn()
    tensors[f"{NAME}.quant_state.bitsandbytes__nf4"] = state(**fields)
    with pytest.raises(error, match=message):
        unpacked(tmp_path, tensors, SETTINGS)


def test_a_state_that_is_no_json_is_malformed(tmp_path: Path) -> None:
    tensors, _ = drawn()
    tensors[f"{NAME}.quant_state.bitsandbytes__nf4"] = torch.zeros(9, dtype=torch.uint8)
    with pytest.raises(MalformedCheckpointError, match="is no quantisation state"):
        unpacked(tmp_path, tensors, SETTINGS)
