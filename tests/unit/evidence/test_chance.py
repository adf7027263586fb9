"""Rounding by chance gives neighbours, and on average the value itself."""

from __future__ import annotations

import pytest
import torch

from lora_deploy.evidence.chance import round_by_chance
from lora_deploy.rounding import round_once, torch_dtype
from lora_deploy.tensors import DType

FORMATS = [DType.F16, DType.BF16, DType.F32]


def rounded(values: torch.Tensor, dtype: DType, seed: int = 0) -> torch.Tensor:
    return round_by_chance(values, dtype, torch.Generator().manual_seed(seed)).to(torch.float64)


@pytest.mark.parametrize("dtype", FORMATS)
def test_values_of_the_format_stay(dtype: DType) -> None:
    values = torch.randn(1000).to(torch_dtype(dtype)).to(torch.float64)
    values[:3] = torch.tensor([0.0, torch.finfo(torch_dtype(dtype)).tiny, torch.finfo(torch_dtype(dtype)).max])
    assert torch.equal(rounded(values, dtype), values)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("size", [1.0, 1e-3, 3e-7])
def test_others_become_one_of_their_two_neighbours(dtype: DType, size: float) -> None:
    values = torch.randn(2000, dtype=torch.float64) * size
    found = rounded(values, dtype)
    nearest = round_once(values, dtype).to(torch.float64)
    is_other = found != nearest
    assert 0 < float(is_other.double().mean()) < 0.5
    assert bool(((found - values) * (nearest - values) <= 0)[is_other].all()), "on the other side of the value"
    between = round_once((found + nearest) / 2, dtype).to(torch.float64)
    assert bool(((between == found) | (between == nearest)).all()), "and nothing lies between"


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("value", [1.0003, -0.1, 3.3e-5, 2.1e-8])
def test_the_expected_value_is_exact(dtype: DType, value: float) -> None:
    values = torch.full((200_000,), value, dtype=torch.float64)
    found = rounded(values, dtype)
    step = float(found.max() - found.min())
    assert abs(float(found.mean()) - value) < 5 * max(step, 1e-300) / 2 / 200_000**0.5


def test_beyond_the_range_it_is_the_largest_value() -> None:
    values = torch.tensor([65_519.0, 70_000.0, -1e9], dtype=torch.float64)
    assert rounded(values, DType.F16).tolist() == [65_504.0, 65_504.0, -65_504.0]


def test_its_squared_error_is_twice_that_of_rounding_to_nearest() -> None:
    values = torch.rand(400_000, dtype=torch.float64) + 1
    by_chance = (rounded(values, DType.BF16) - values).square().mean()
    nearest = (round_once(values, DType.BF16).to(torch.float64) - values).square().mean()
    assert float(by_chance / nearest) == pytest.approx(2, rel=0.02)
