"""Scale, low-rank, replacement and token rows by hand."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_deploy.errors import UnmergeableAdapterError
from lora_deploy.updates.interface import Scale
from lora_deploy.updates.low_rank import LowRank
from lora_deploy.updates.replacement import Replacement
from lora_deploy.updates.token_rows import TokenRows
from tests.unit.adapters.apply import evaluate

HALF = Scale(factor=Fraction(1, 2), source="test")


# --------------------------------------------------------------------------------------------------------------- scale


@given(st.fractions(min_value=-1000, max_value=1000), st.integers(1, 512))
def test_a_scale_is_the_float64_nearest_to_its_exact_value(factor: Fraction, root: int) -> None:
    value = Scale(factor=factor, root=root, source="").value
    if not factor:
        assert value == 0
        return
    assert math.copysign(1, value) == (1 if factor > 0 else -1)
    exact_square = factor**2 / root
    for other in (math.nextafter(value, math.inf), math.nextafter(value, -math.inf)):
        midpoint = (Fraction(value) + Fraction(other)) / 2
        if abs(other) > abs(value):
            assert exact_square <= midpoint**2
        else:
            assert exact_square >= midpoint**2


def test_scales_multiply_exactly() -> None:
    scale = Scale(factor=Fraction(16), root=8, source="a").times(0.1)
    assert scale.factor == 16 * Fraction(0.1)
    assert (scale.root, scale.source) == (8, "a")
    assert scale.times(2, "b").source == "b"


# ------------------------------------------------------------------------------------------------------------ low rank


def test_a_low_rank_update_adds_scale_times_up_times_down() -> None:
    update = LowRank(down=torch.tensor([[2.0, 4.0]]), up=torch.tensor([[1.0], [10.0]]), scale=HALF)
    weight = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    assert evaluate(update, weight, block_rows=1).tolist() == [[2, 3], [10, 20]]
    assert torch.equal(evaluate(update.transposed(), weight.T.contiguous()), evaluate(update, weight).T)
    assert update.rows(slice(1, 2)).delta().tolist() == [[10, 20]]
    assert update.weighted(0.5).delta().tolist() == [[0.5, 1], [5, 10]]
    assert (update.rank, update.shape, update.n_bytes) == (1, (2, 2), 16)


# ------------------------------------------------------------------------------------------------- replaced and copied


def test_a_replacement_is_its_values_whatever_was_there() -> None:
    update = Replacement(values=torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.bfloat16))
    assert evaluate(update, torch.full((2, 2), 9.0), block_rows=1).tolist() == [[1, 2], [3, 4]]
    assert evaluate(update.transposed(), torch.zeros(2, 2)).tolist() == [[1, 3], [2, 4]]


def test_token_rows_replace_the_rows_of_their_ids_across_blocks() -> None:
    rows = TokenRows(indices=(4, 0), values=torch.tensor([[5.0, 5.0], [1.0, 1.0]]), n_rows=6)
    before = torch.zeros(6, 2)
    assert evaluate(rows, before, block_rows=4)[:, 0].tolist() == [1, 0, 0, 0, 5, 0]
    assert before.sum() == 0
    assert TokenRows(indices=(4, 0), values=torch.zeros(2, 3)).shape == (5, 3)
    with pytest.raises(UnmergeableAdapterError, match="no transposed form"):
        rows.transposed()


@pytest.mark.parametrize(
    "update",
    [Replacement(values=torch.ones(2)), TokenRows(indices=(0,), values=torch.ones(1, 2))],
    ids=["tensor", "rows"],
)
def test_what_replaces_cannot_be_weighted(update: Replacement | TokenRows) -> None:
    assert update.weighted(1) is update
    with pytest.raises(UnmergeableAdapterError, match="cannot be weighted: found weight 2"):
        update.weighted(2)
