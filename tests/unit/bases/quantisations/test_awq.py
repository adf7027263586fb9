"""AWQ layers, packed here from the published layout, come back as scale · (q − zero)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_deploy.errors import InputError, MalformedCheckpointError
from tests.unit.bases.quantisations.unpacked import LAYER, tensor_of, unpacked

NAME = f"{LAYER}.weight"
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
N_IN, N_OUT, GROUP = 96, 40, 32
SETTINGS = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}


def words(codes: Tensor) -> Tensor:
    """Pack (n, out): of each eight outputs, the k-th four bits of the word hold the output ORDER[k]."""
    packed = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int64)
    for k, output in enumerate(ORDER):
        packed |= codes[:, output::8] << (4 * k)
    return (packed - ((packed >> 31) << 32)).to(torch.int32)


def drawn() -> tuple[dict[str, Tensor], Tensor]:
    codes, zeros = torch.randint(0, 16, (N_IN, N_OUT)), torch.randint(0, 16, (N_IN // GROUP, N_OUT))
    scales = torch.randn(N_IN // GROUP, N_OUT).half()
    groups = torch.arange(N_IN) // GROUP
    tensors = {f"{LAYER}.qweight": words(codes), f"{LAYER}.qzeros": words(zeros), f"{LAYER}.scales": scales}
    return tensors, (scales.double()[groups] * (codes - zeros[groups])).T


def test_a_layer_is_scale_times_code_less_zero(tmp_path: Path) -> None:
    tensors, exact = drawn()
    base = unpacked(tmp_path, tensors, SETTINGS, torch_dtype="bfloat16")
    assert list(base.tensors) == [NAME]
    found = tensor_of(base, NAME)
    assert found.dtype == torch.bfloat16
    assert (found.double() - exact).abs().max() <= exact.abs().max() * 2**-8
    assert torch.equal(tensor_of(unpacked(tmp_path, tensors, SETTINGS, torch_dtype="float32"), NAME).double(), exact)


@pytest.mark.parametrize("n_rows", [1, 3, 7])
def test_it_does_not_matter_how_few_rows_are_unpacked_at_once(
    n_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_deploy.bases.dequantise._BLOCK_ELEMENTS", n_rows * N_IN)
    tensors, exact = drawn()
    assert torch.equal(tensor_of(unpacked(tmp_path, tensors, SETTINGS, torch_dtype="float32"), NAME).double(), exact)


def test_a_hand_packed_word_is_interleaved(tmp_path: Path) -> None:
    """The word 0x76543210 holds 0 … 7, lowest first, for the outputs 0, 2, 4, 6, 1, 3, 5, 7."""
    tensors = {
        f"{LAYER}.qweight": torch.full((1, 1), 0x76543210, dtype=torch.int32),
        f"{LAYER}.qzeros": torch.zeros(1, 1, dtype=torch.int32),
        f"{LAYER}.scales": torch.ones(1, 8, dtype=torch.float16),
    }
    base = unpacked(tmp_path, tensors, {**SETTINGS, "group_size": -1})
    assert tensor_of(base, NAME)[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_the_names_of_older_settings_count(tmp_path: Path) -> None:
    tensors, exact = drawn()
    (tmp_path / "quant_config.json").write_text(
        '{"zero_point": true, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}'
    )
    assert torch.equal(tensor_of(unpacked(tmp_path, tensors, None, torch_dtype="float32"), NAME).double(), exact)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "other bits": ({"bits": 3}, "of 3 bits"),
    "another layout": ({"version": "gemv"}, "in the layout 'gemv'"),
    "no zero points": ({"zero_point": False}, "without zero points"),
}


@pytest.mark.parametrize(("more", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_known_is_refused_by_name(more: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        unpacked(tmp_path, drawn()[0], SETTINGS | more)


def test_groups_that_do_not_cover_the_inputs_are_malformed(tmp_path: Path) -> None:
    with pytest.raises(MalformedCheckpointError, match="3 groups for 96 inputs, the configuration says 64"):
        unpacked(tmp_path, drawn()[0], {**SETTINGS, "group_size": 64})


def test_zero_points_of_another_width_are_malformed(tmp_path: Path) -> None:
    tensors, _ = drawn()
    tensors[f"{LAYER}.qzeros"] = tensors[f"{LAYER}.qzeros"][:, :4]
    with pytest.raises(MalformedCheckpointError, match=r"qzeros: found shape \(3, 4\), expected \(3, 5\)"):
        unpacked(tmp_path, tensors, SETTINGS)
