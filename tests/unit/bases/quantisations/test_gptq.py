"""GPTQ layers, packed here field by field from the published layout, come back as scale · (q − zero)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_deploy.errors import InputError, MalformedCheckpointError
from tests.unit.bases.quantisations.unpacked import LAYER, tensor_of, unpacked

NAME = f"{LAYER}.weight"


def stream(values: Sequence[int], bits: int) -> list[int]:
    """Write values one after the other into a stream of bits, lowest first, and cut it into signed 32-bit words."""
    whole = sum(value << (bits * k) for k, value in enumerate(values))
    words = [(whole >> (32 * k)) & 0xFFFFFFFF for k in range(len(values) * bits // 32)]
    return [word - (1 << 32) if word >> 31 else word for word in words]


def packed(
    codes: Tensor, zeros: Tensor, scales: Tensor, bits: int, *, stored_below: int = 1, groups: Tensor | None = None
) -> dict[str, Tensor]:
    """Pack codes (in, out) with zeros and scales (groups, out)."""
    tensors = {
        f"{LAYER}.qweight": torch.tensor([stream(column.tolist(), bits) for column in codes.T], dtype=torch.int32).T,
        f"{LAYER}.qzeros": torch.tensor(
            [stream((row - stored_below).tolist(), bits) for row in zeros], dtype=torch.int32
        ),
        f"{LAYER}.scales": scales,
        f"{LAYER}.bias": torch.ones(codes.shape[1], dtype=torch.float16),
    }
    return tensors if groups is None else {**tensors, f"{LAYER}.g_idx": groups.int()}


def drawn(bits: int, n_in: int = 96, n_out: int = 64, n_groups: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    codes = torch.randint(0, 1 << bits, (n_in, n_out))
    zeros = torch.randint(1, 1 << bits, (n_groups, n_out))  # version 1 cannot store a zero point of 0
    return codes, zeros, torch.randn(n_groups, n_out).half()


def exact(codes: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor) -> Tensor:
    return (scales.double()[groups] * (codes - zeros[groups])).T


def settings(bits: int, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": 32, "desc_act": False, **more}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_width_in_both_versions_is_scale_times_code_less_zero(bits: int, version: int, tmp_path: Path) -> None:
    codes, zeros, scales = drawn(bits)
    tensors = packed(codes, zeros, scales, bits, stored_below=2 - version)
    form = {"checkpoint_format": "gptq_v2"} if version == 2 else {}
    base = unpacked(tmp_path, tensors, settings(bits, **form), torch_dtype="float16")
    assert sorted(base.tensors) == [f"{LAYER}.bias", NAME]
    expected = exact(codes, zeros, scales, torch.arange(96) // 32)
    assert torch.equal(tensor_of(base, NAME), expected.half())


@pytest.mark.parametrize("n_rows", [1, 3, 7])
def test_it_does_not_matter_how_few_rows_are_unpacked_at_once(
    n_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_deploy.bases.dequantise._BLOCK_ELEMENTS", n_rows * 96)
    codes, zeros, scales = drawn(3)
    groups = torch.randperm(96) // 32
    base = unpacked(tmp_path, packed(codes, zeros, scales, 3, groups=groups), settings(3, desc_act=True))
    assert torch.equal(tensor_of(base, NAME), exact(codes, zeros, scales, groups).half())


def test_a_hand_packed_word_says_what_it_is_meant_to(tmp_path: Path) -> None:
    """Eight inputs, codes 0 … 7 in one word, lowest first; zero 3 is stored as 2; the scale is 0.5."""
    tensors = {
        f"{LAYER}.qweight": torch.full((1, 8), 0x76543210, dtype=torch.int32),
        f"{LAYER}.qzeros": torch.full((1, 1), 0x22222222, dtype=torch.int32),
        f"{LAYER}.scales": torch.full((1, 8), 0.5, dtype=torch.float16),
    }
    base = unpacked(tmp_path, tensors, settings(4, group_size=-1), torch_dtype="float16")
    assert tensor_of(base, NAME)[5].tolist() == [-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0]


def test_with_act_order_every_input_has_the_group_that_g_idx_names(tmp_path: Path) -> None:
    codes, zeros, scales = drawn(4)
    groups = torch.randperm(96) // 32
    base = unpacked(tmp_path, packed(codes, zeros, scales, 4, groups=groups), settings(4, desc_act=True))
    assert torch.equal(tensor_of(base, NAME), exact(codes, zeros, scales, groups).half())


def test_settings_of_a_file_beside_the_configuration_count(tmp_path: Path) -> None:
    codes, zeros, scales = drawn(4)
    (tmp_path / "quantize_config.json").write_text('{"bits": 4, "group_size": 32, "desc_act": false}')
    base = unpacked(tmp_path, packed(codes, zeros, scales, 4), None)
    assert torch.equal(tensor_of(base, NAME), exact(codes, zeros, scales, torch.arange(96) // 32).half())
    assert not (base.root / "quantize_config.json").exists()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another layout": ({"checkpoint_format": "marlin"}, "in the layout 'marlin'"),
    "an older mark of that layout": ({"is_marlin_format": True}, "in the layout 'marlin'"),
    "another word": ({"pack_dtype": "int16"}, "packed in int16"),
    "other bits than its shapes say": ({"bits": 8}, "of 4 bits by its shapes, of 8 by its configuration"),
    "no bits": ({"bits": None}, "of 4 bits by its shapes, of None"),
    "act-order without an index": ({"desc_act": True}, r"act-order \(desc_act\) and no g_idx"),
}


@pytest.mark.parametrize(("more", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_known_is_refused_by_name(more: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        unpacked(tmp_path, packed(*drawn(4), 4), settings(4) | more)


def test_a_zero_point_that_version_1_cannot_say_is_refused(tmp_path: Path) -> None:
    codes, zeros, scales = drawn(4)
    zeros[1, 2] = 16
    with pytest.raises(InputError, match="zero point that version 1 of GPTQ cannot say"):
        unpacked(tmp_path, packed(codes, zeros, scales, 4), settings(4))


@pytest.mark.parametrize("group_size", [16, 48, 0, "32"])
def test_groups_that_do_not_cover_the_inputs_are_malformed(group_size: Any, tmp_path: Path) -> None:
    with pytest.raises(MalformedCheckpointError, match="3 groups for 96 inputs"):
        unpacked(tmp_path, packed(*drawn(4), 4), settings(4, group_size=group_size))


def test_an_index_beyond_the_groups_is_malformed(tmp_path: Path) -> None:
    with pytest.raises(MalformedCheckpointError, match="beyond the 3 that have scales"):
        unpacked(tmp_path, packed(*drawn(4), 4, groups=torch.arange(96) // 24), settings(4))


@pytest.mark.parametrize("lost", ["qzeros", "scales"])
def test_a_layer_that_lost_a_tensor_is_malformed(lost: str, tmp_path: Path) -> None:
    tensors = packed(*drawn(4), 4)
    del tensors[f"{LAYER}.{lost}"]
    with pytest.raises(MalformedCheckpointError, match=rf"has no {LAYER}\.{lost}"):
        unpacked(tmp_path, tensors, settings(4))
