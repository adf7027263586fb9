"""compressed-tensors integers, packed here from the published layout, come back as scale · (q − zero)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_deploy.errors import InputError, MalformedCheckpointError
from tests.unit.bases.quantisations.test_gptq import stream
from tests.unit.bases.quantisations.unpacked import LAYER, tensor_of, unpacked

NAME = f"{LAYER}.weight"
N_OUT, N_IN, GROUP = 12, 40, 20


def settings(bits: int = 4, form: str = "pack-quantized", **weights: Any) -> dict[str, Any]:
    whole = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": GROUP, **weights}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": {"weights": whole}}}


def packed(values: Tensor, bits: int) -> Tensor:
    """Write every row, above zero by half the range, lowest bit first, into as many words as it needs."""
    rows = [[*row, *[0] * (-len(row) % (32 // bits))] for row in (values + (1 << bits - 1)).tolist()]
    return torch.tensor([stream(row, bits) for row in rows], dtype=torch.int32)


def drawn(bits: int, *, zeros: bool) -> tuple[dict[str, Tensor], Tensor]:
    low, high = -(1 << bits - 1), 1 << bits - 1
    values, zero = torch.randint(low, high, (N_OUT, N_IN)), torch.randint(low, high, (N_OUT, N_IN // GROUP))
    scale = torch.rand(N_OUT, N_IN // GROUP).half() + 0.1
    tensors = {
        f"{NAME}_packed": packed(values, bits),
        f"{NAME}_scale": scale,
        f"{NAME}_shape": torch.tensor([N_OUT, N_IN]),
    }
    group = torch.arange(N_IN) // GROUP
    if zeros:
        tensors[f"{NAME}_zero_point"] = packed(zero.T, bits).T
        values = values - zero[:, group]
    return tensors, values * scale.double()[:, group]


@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "with zero points"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packed_integers_are_scale_times_value_less_zero(bits: int, zeros: bool, tmp_path: Path) -> None:
    tensors, exact = drawn(bits, zeros=zeros)
    base = unpacked(tmp_path, tensors, settings(bits), dtype="float32")
    assert list(base.tensors) == [NAME]
    assert torch.equal(tensor_of(base, NAME).double(), exact)


@pytest.mark.parametrize("n_rows", [1, 3, 7])
def test_it_does_not_matter_how_few_rows_are_unpacked_at_once(
    n_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_deploy.bases.dequantise._BLOCK_ELEMENTS", n_rows * N_IN)
    tensors, exact = drawn(4, zeros=True)
    assert torch.equal(tensor_of(unpacked(tmp_path, tensors, settings(), dtype="float32"), NAME).double(), exact)


def test_a_hand_packed_row_says_what_it_is_meant_to(tmp_path: Path) -> None:
    """Codes 0 … 7 stand for −8 … −1; the scale is 0.5."""
    tensors = {
        f"{NAME}_packed": torch.full((1, 1), 0x76543210, dtype=torch.int32),
        f"{NAME}_scale": torch.full((1, 1), 0.5),
        f"{NAME}_shape": torch.tensor([1, 8]),
    }
    base = unpacked(tmp_path, tensors, settings(strategy="channel", group_size=None), dtype="float32")
    assert tensor_of(base, NAME).tolist() == [[-4.0, -3.5, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5]]


@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "with zero points"])
def test_integers_in_bytes_are_scale_times_value_less_zero(zeros: bool, tmp_path: Path) -> None:
    weight, scale = torch.randint(-128, 128, (6, 10)), torch.rand(6, 1)
    zero = torch.randint(-5, 5, (6, 1)) if zeros else torch.zeros(6, 1, dtype=torch.int64)
    tensors = {NAME: weight.to(torch.int8), f"{NAME}_scale": scale}
    tensors |= {f"{NAME}_zero_point": zero.to(torch.int8)} if zeros else {}
    base = unpacked(tmp_path, tensors, settings(8, "int-quantized", strategy="channel"), dtype="float32")
    assert list(base.tensors) == [NAME]
    assert torch.equal(tensor_of(base, NAME), ((weight - zero).double() * scale.double()).float())


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Tensor], str]] = {
    "act-order": (settings(), {f"{NAME}_g_idx": torch.zeros(N_IN, dtype=torch.int32)}, "act-order"),
    "other bits": (settings(8), {}, "40 inputs in 5 words, of 8 bits"),
    "three bits": (settings(3), {}, "of 3 bits"),
    "another format": (settings(form="marlin-24"), {}, "in the format 'marlin-24'"),
}


@pytest.mark.parametrize(("how", "more", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_known_is_refused_by_name(
    how: dict[str, Any], more: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        unpacked(tmp_path, drawn(4, zeros=False)[0] | more, how)


def test_zero_points_of_another_shape_are_malformed(tmp_path: Path) -> None:
    tensors, _ = drawn(4, zeros=True)
    tensors[f"{NAME}_zero_point"] = tensors[f"{NAME}_zero_point"][:1]
    with pytest.raises(MalformedCheckpointError, match=r"zero_point: found shape \(1, 2\), expected \(2, 2\)"):
        unpacked(tmp_path, tensors, settings())
