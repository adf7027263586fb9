"""MXFP4 experts come back as sign · magnitude · 2^(exponent − 127), inputs and outputs swapped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lora_deploy.errors import MalformedCheckpointError
from tests.unit.bases.quantisations.unpacked import tensor_of, unpacked

NAME = "model.layers.0.mlp.experts.gate_up_proj"
SETTINGS = {"quant_method": "mxfp4"}


def value(code: int) -> float:
    """E2M1: a sign, two bits of exponent with bias 1, one bit of mantissa; exponent 0 is subnormal."""
    exponent, mantissa = code >> 1 & 3, code & 1
    size = mantissa * 0.5 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return -size if code & 8 else size


def drawn(n_experts: int = 2, n_out: int = 6, n_groups: int = 3) -> tuple[dict[str, Tensor], Tensor]:
    codes = torch.randint(0, 16, (n_experts, n_out, n_groups, 32))
    exponents = torch.randint(100, 140, (n_experts, n_out, n_groups))
    blocks = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
    values = torch.tensor([value(code) for code in range(16)], dtype=torch.float64)[codes]
    exact = values * 2.0 ** (exponents[..., None].double() - 127)
    tensors = {
        f"{NAME}_blocks": blocks,
        f"{NAME}_scales": exponents.to(torch.uint8),
        f"{NAME}_bias": torch.ones(n_experts, n_out, dtype=torch.bfloat16),
    }
    return tensors, exact.reshape(n_experts, n_out, -1).transpose(1, 2)


@pytest.mark.parametrize("n_elements", [1, 100, 1 << 20])
def test_experts_are_unpacked_exactly_however_few_rows_at_once(
    n_elements: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_deploy.bases.dequantise._BLOCK_ELEMENTS", n_elements)
    tensors, exact = drawn()
    base = unpacked(tmp_path, tensors, SETTINGS)
    assert sorted(base.tensors) == [NAME, f"{NAME}_bias"]
    assert tensor_of(base, NAME).dtype == torch.bfloat16
    assert torch.equal(tensor_of(base, NAME).double(), exact)


def test_an_exponent_that_is_no_number_is_malformed(tmp_path: Path) -> None:
    tensors, _ = drawn()
    tensors[f"{NAME}_scales"][1, 2, 0] = 255
    with pytest.raises(MalformedCheckpointError, match=r"no number \(E8M0 255\)"):
        unpacked(tmp_path, tensors, SETTINGS)


def test_scales_for_other_groups_are_malformed(tmp_path: Path) -> None:
    tensors, _ = drawn()
    tensors[f"{NAME}_scales"] = tensors[f"{NAME}_scales"][:, :, :2]
    with pytest.raises(MalformedCheckpointError, match=r"_scales: found shape \(2, 6, 2\), expected \(2, 6, 3\)"):
        unpacked(tmp_path, tensors, SETTINGS)


def test_blocks_of_another_size_are_malformed(tmp_path: Path) -> None:
    tensors, _ = drawn()
    tensors[f"{NAME}_blocks"] = tensors[f"{NAME}_blocks"][..., :8]
    with pytest.raises(MalformedCheckpointError, match=r"expected uint8 \(experts, rows, groups, 16\)"):
        unpacked(tmp_path, tensors, SETTINGS)
