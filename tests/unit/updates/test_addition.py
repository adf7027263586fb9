"""Dense differences by hand."""

from fractions import Fraction

import pytest
import torch

from lora_deploy.updates.addition import Addition
from lora_deploy.updates.interface import Scale
from tests.unit.adapters.apply import evaluate

HALF = Scale(factor=Fraction(1, 2), source="test")


def test_a_scaled_difference_is_added_to_a_bias() -> None:
    update = Addition(values=torch.tensor([2.0, 4.0, 6.0, 8.0], dtype=torch.float16), scale=HALF)
    assert update.shape == (4, 1)
    assert evaluate(update, torch.tensor([1.0, 1.0, 1.0, 1.0])).tolist() == [2, 3, 4, 5]


def test_a_matrix_and_its_transpose() -> None:
    update = Addition(values=torch.tensor([[2.0, 4.0, 6.0]]), scale=HALF)
    weight = torch.zeros(1, 3)
    assert evaluate(update, weight).tolist() == [[1, 2, 3]]
    assert evaluate(update.transposed(), weight.T).tolist() == [[1], [2], [3]]


@pytest.mark.parametrize(("shape", "region"), [((), (1, 1)), ((0, 3), (0, 0)), ((2, 3, 4), (2, 12))])
def test_its_region_is_the_first_axis_by_the_others(shape: tuple[int, ...], region: tuple[int, int]) -> None:
    assert Addition(values=torch.zeros(shape), scale=HALF).shape == region


def test_a_weight_multiplies_the_scale_exactly() -> None:
    update = Addition(values=torch.ones(2), scale=HALF).weighted(0.1)
    assert update.scale.factor == Fraction(0.1) / 2
    assert update.n_bytes == 8
