"""Kinds that add a difference of their own making: each by hand, turned round, weighted, and cut into odd blocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from lora_deploy.updates.additive import Additive
from lora_deploy.updates.circulant import Circulant
from lora_deploy.updates.interface import Scale
from lora_deploy.updates.random_bases import RandomBases
from lora_deploy.updates.scaled_product import ScaledProduct
from lora_deploy.updates.sparse import Sparse
from lora_deploy.updates.spectral import Spectral
from tests.unit.adapters.apply import evaluate

ONE = Scale(factor=Fraction(1), source="test")
HALF = Scale(factor=Fraction(1, 2), source="test")


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def scaled_product() -> ScaledProduct:
    return ScaledProduct(
        up=numbers(7, 3), down=numbers(3, 5), inner=numbers(3), row=numbers(7), column=numbers(5), scale=HALF
    )


def random_bases(*, is_turned: bool = False) -> RandomBases:
    return RandomBases(
        shared_up=numbers(7, 3, 2),
        shared_down=numbers(2, 5),
        sizes=numbers(2, 3, seed=1),
        widths=numbers(3, 5, seed=2),
        is_turned=is_turned,
        scale=HALF,
    )


def circulant() -> Circulant:
    return Circulant(kernel=numbers(3, 2, 4), scale=HALF)


def spectral() -> Spectral:
    places = torch.randperm(35, generator=torch.Generator().manual_seed(1))[:9]
    return Spectral(rows_of=places // 5, columns_of=places % 5, coefficients=numbers(9), n_rows=7, n_cols=5, scale=HALF)


def sparse() -> Sparse:
    row, column = torch.tensor([6, 0, 3, 3, 0], dtype=torch.int32), torch.tensor([4, 0, 2, 2, 1], dtype=torch.int32)
    return Sparse.at(row, column, torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), (7, 5), HALF)


KINDS: list[Callable[[], Additive]] = [
    scaled_product,
    random_bases,
    lambda: random_bases(is_turned=True),
    circulant,
    spectral,
    sparse,
]
NAMES = ["scaled product", "random bases", "random bases turned", "circulant", "spectral", "sparse"]


def difference(update: Additive, block_rows: int = 3) -> Tensor:
    return evaluate(update, torch.zeros(update.shape), block_rows)


@pytest.mark.parametrize("make", KINDS, ids=NAMES)
def test_the_transposed_update_changes_the_transposed_weight(make: Callable[[], Additive]) -> None:
    update = make()
    turned = update.transposed()
    assert turned.shape == update.shape[::-1]
    torch.testing.assert_close(difference(turned).T, difference(update))
    torch.testing.assert_close(difference(turned.transposed()), difference(update))


@pytest.mark.parametrize("make", KINDS, ids=NAMES)
def test_a_weight_multiplies_the_difference_that_is_added(make: Callable[[], Additive]) -> None:
    update = make()
    weight = numbers(*update.shape, seed=5).double()
    assert difference(update).abs().max() > 0.05
    assert update.weighted(3).scale.factor == Fraction(3, 2)
    torch.testing.assert_close(evaluate(update.weighted(3), weight), weight + 3 * difference(update))


@pytest.mark.parametrize("make", KINDS, ids=NAMES)
def test_rows_do_not_depend_on_the_block_they_are_in(make: Callable[[], Additive]) -> None:
    whole = difference(make(), 100)
    for block_rows in (1, 2, 4):
        torch.testing.assert_close(difference(make(), block_rows), whole, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("make", KINDS, ids=NAMES)
def test_its_memory_is_that_of_its_tensors_at_least(make: Callable[[], Additive]) -> None:
    assert make().n_bytes >= 4
    assert make().n_prepared_bytes >= 0


def test_a_scaled_product_by_hand() -> None:
    update = ScaledProduct(
        up=torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float16),
        down=torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]], dtype=torch.bfloat16),
        inner=torch.tensor([10.0, 1.0]),
        row=torch.tensor([1.0, 2.0]),
        column=torch.tensor([1.0, 1.0, 3.0]),
        scale=HALF,
    )
    assert difference(update).tolist() == [[5, 1, 18], [30, 4, 102]]
    assert update.n_prepared_bytes == 2 * 8 * 6


def test_random_bases_multiply_the_common_axis_in_the_two_orders_of_the_peer() -> None:
    """Column b·r + j of one factor meets row j·n + b of the other: with r ≠ n, the orders differ."""
    update = random_bases()
    left = update.shared_up.double().reshape(7, 6)
    right = torch.stack(
        [
            update.sizes[j, b].double() * update.shared_down[j].double() * update.widths[b].double()
            for j in range(2)
            for b in range(3)
        ]
    )
    torch.testing.assert_close(difference(update), 0.5 * left @ right)


def test_a_circulant_block_shifts_its_first_row() -> None:
    update = Circulant(kernel=torch.tensor([[[1.0, 2.0, 3.0]]]), scale=ONE)
    assert difference(update).tolist() == [[1, 2, 3], [3, 1, 2], [2, 3, 1]]


def test_the_rows_of_a_spectral_difference_are_those_of_the_whole_transform() -> None:
    update = spectral()
    dense = torch.zeros(7, 5, dtype=torch.float64)
    dense[update.rows_of, update.columns_of] = update.coefficients.double()
    torch.testing.assert_close(difference(update), 0.5 * torch.fft.ifft2(dense).real, rtol=1e-13, atol=1e-15)


def test_one_coefficient_is_a_cosine() -> None:
    update = Spectral(
        rows_of=torch.tensor([1]),
        columns_of=torch.tensor([0]),
        coefficients=torch.tensor([8.0]),
        n_rows=4,
        n_cols=2,
        scale=ONE,
    )
    expected = torch.tensor([[math.cos(2 * math.pi * m / 4)] * 2 for m in range(4)], dtype=torch.float64)
    torch.testing.assert_close(difference(update), expected, rtol=1e-15, atol=1e-15)


def test_entries_of_one_place_add_up_in_their_order() -> None:
    assert difference(sparse())[3, 2] == 3.5
    values = torch.tensor([1e16, -1e16, 1.0], dtype=torch.float64)
    same = torch.zeros(3, dtype=torch.int64)
    assert difference(Sparse.at(same, same, values, (1, 1), ONE)).item() == 1
    assert difference(Sparse.at(same, same, values.roll(1), (1, 1), ONE)).item() == 0
