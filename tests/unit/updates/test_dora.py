"""DoRA by hand: rows and columns, laws, zero norms."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_deploy.errors import NonFiniteTensorError, UnmergeableAdapterError
from lora_deploy.updates import dora
from lora_deploy.updates.dora import Dora
from lora_deploy.updates.interface import Scale
from lora_deploy.updates.low_rank import LowRank
from lora_deploy.updates.residual import Residual
from tests.unit.adapters.apply import evaluate

HALF = Scale(factor=Fraction(1, 2), source="test")
DELTA = LowRank(down=torch.tensor([[2.0, 0.0]]), up=torch.tensor([[1.0], [0.0]]), scale=HALF)
"""[[1, 0], [0, 0]]"""
WEIGHT = torch.tensor([[2.0, 4.0], [6.0, 8.0]], dtype=torch.float64)
"""With the delta: [[3, 4], [6, 8]], rows of length 5 and 10."""


def test_rows_get_the_learned_length() -> None:
    update = Dora(inner=DELTA, magnitude=torch.tensor([10.0, 5.0]), axis="rows")
    assert evaluate(update, WEIGHT).tolist() == [[6, 8], [3, 4]]


def test_columns_get_the_learned_length() -> None:
    update = Dora(inner=DELTA, magnitude=torch.tensor([45.0**0.5, 0.0], dtype=torch.float64), axis="columns")
    torch.testing.assert_close(evaluate(update, WEIGHT), torch.tensor([[3.0, 0.0], [6.0, 0.0]]).double())


def test_the_transposed_update_changes_the_transposed_weight() -> None:
    update = Dora(inner=DELTA, magnitude=torch.tensor([10.0, 5.0]), axis="rows")
    turned = update.transposed()
    assert turned.axis == "columns"
    torch.testing.assert_close(evaluate(turned, WEIGHT.T.contiguous()), evaluate(update, WEIGHT).T)
    assert turned.transposed().axis == "rows"


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from(["rows", "columns"]), st.integers(0, 2**31))
def test_the_norm_as_magnitude_gives_weight_plus_delta(n_rows: int, n_cols: int, axis: str, seed: int) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(n_rows, n_cols, dtype=torch.float64) + 0.1
    delta = LowRank(down=torch.randn(2, n_cols), up=torch.randn(n_rows, 2), scale=HALF)
    direction = weight + delta.delta()
    magnitude = torch.linalg.vector_norm(direction, dim=1 if axis == "rows" else 0)
    update = Dora(inner=delta, magnitude=magnitude, axis="rows" if axis == "rows" else "columns")
    torch.testing.assert_close(evaluate(update, weight), direction)


def test_column_norms_do_not_depend_on_the_blocks_of_the_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(3000, 7, dtype=torch.float64)
    delta = LowRank(down=torch.randn(2, 7), up=torch.randn(3000, 2), scale=HALF)
    update = Dora(inner=delta, magnitude=torch.rand(7), axis="columns")
    read: list[slice] = []

    def rows_of(rows: slice) -> Tensor:
        read.append(rows)
        return weight[rows].clone()

    state = update.prepare(rows_of)
    assert read == [slice(0, 1024), slice(1024, 2048), slice(2048, 3000)]
    monkeypatch.setattr(dora, "NORM_BLOCK_ROWS", 700)
    other = update.prepare(rows_of)
    assert state.column_norms is not None
    assert other.column_norms is not None
    torch.testing.assert_close(state.column_norms, other.column_norms)


@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_a_norm_of_zero_is_an_error_that_names_the_row_or_column(axis: str) -> None:
    zero = torch.zeros(5, 5, dtype=torch.float64) + torch.eye(5, dtype=torch.float64)
    zero[4, 4] = 0
    nothing = LowRank(down=torch.zeros(1, 5), up=torch.zeros(5, 1), scale=HALF)
    update = Dora(inner=nothing, magnitude=torch.ones(5), axis="rows" if axis == "rows" else "columns")
    with pytest.raises(NonFiniteTensorError, match=f"{axis[:-1]} 4 of W"):
        evaluate(update, zero)


def test_a_weight_other_than_one_is_refused() -> None:
    update = Dora(inner=DELTA, magnitude=torch.ones(2), axis="rows")
    assert update.weighted(1.0) is update
    with pytest.raises(UnmergeableAdapterError, match="a dora update cannot be weighted: found weight 2"):
        update.weighted(2.0)


def test_it_reads_the_whole_weight_only_for_a_residual() -> None:
    assert not Dora(inner=DELTA, magnitude=torch.ones(2), axis="columns").needs_whole
    residual = Residual(low_rank=DELTA, method="pissa")
    assert Dora(inner=residual, magnitude=torch.ones(2), axis="rows").needs_whole


def test_dora_on_a_residual_normalises_the_residual_plus_delta() -> None:
    """Without its largest component, 5, the weight is [[3, 0], [0, 0]]; the delta is [[0, 0], [1, 2]]."""
    weight = torch.tensor([[3.0, 0.0], [0.0, 5.0]], dtype=torch.float64)
    delta = LowRank(down=torch.tensor([[1.0, 2.0]]), up=torch.tensor([[0.0], [2.0]]), scale=HALF)
    update = Dora(inner=Residual(low_rank=delta, method="pissa"), magnitude=torch.tensor([6.0, 5.0**0.5]), axis="rows")
    torch.testing.assert_close(
        evaluate(update, weight), torch.tensor([[6.0, 0.0], [1.0, 2.0]]).double(), rtol=1e-7, atol=1e-12
    )


def test_its_memory_and_shape_are_those_of_its_parts() -> None:
    update = Dora(inner=DELTA, magnitude=torch.ones(2), axis="rows")
    assert update.shape == (2, 2)
    assert update.n_bytes == DELTA.n_bytes + 8
