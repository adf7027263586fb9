"""The scale that another format computes is the one that was read, as exact fractions; or there is none."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_deploy.convert.scale import exact_alpha, needs_root
from lora_deploy.updates.interface import Scale


def scale_of(factor: Fraction | float, root: int = 1) -> Scale:
    return Scale(factor=Fraction(factor), root=root, source="test")


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=-1e30, max_value=1e30), st.integers(1, 300))
def test_every_float_is_an_alpha_over_some_rank(value: float, rank: int) -> None:
    found = exact_alpha(scale_of(value), rank)
    assert found is not None
    assert rank <= found.rank <= 2 * rank
    assert Fraction(found.alpha) / found.rank == Fraction(value)


@given(st.integers(-100, 100), st.integers(1, 100))
def test_what_peft_configured_comes_back_as_it_was(alpha: int, rank: int) -> None:
    found = exact_alpha(scale_of(Fraction(alpha, rank)), rank)
    assert found is not None
    assert (found.alpha, found.rank) == (alpha, rank)


@given(st.integers(1, 100), st.integers(1, 100))
def test_a_scale_over_a_root_needs_a_rank_stabilised_alpha(alpha: int, rank: int) -> None:
    scale = scale_of(alpha, root=rank)
    found = exact_alpha(scale, rank, is_rank_stabilised=True)
    assert found is not None
    assert Fraction(found.alpha) ** 2 / found.rank == Fraction(alpha) ** 2 / rank
    assert (exact_alpha(scale, rank) is None) == needs_root(scale) == (math.isqrt(rank) ** 2 != rank)


@given(st.integers(1, 60), st.integers(1, 60))
def test_a_plain_scale_among_stabilised_ones_is_padded_to_a_square(alpha: int, rank: int) -> None:
    found = exact_alpha(scale_of(Fraction(alpha, 4)), rank, is_rank_stabilised=True)
    assert found is not None
    assert Fraction(found.alpha) / math.isqrt(found.rank) == Fraction(alpha, 4)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_an_alpha_of_single_precision_is_one(value: float) -> None:
    found = exact_alpha(scale_of(value), 8, single=True)
    if found is not None:
        assert Fraction(float(np.float32(found.alpha))) == Fraction(found.alpha) == Fraction(value) * found.rank


@pytest.mark.parametrize(
    ("scale", "rank", "stabilised"),
    [(scale_of(Fraction(1, 997)), 4, False), (scale_of(1, root=3), 8, True), (scale_of(Fraction(10) ** 400), 1, False)],
    ids=["a third of nothing", "a root below the rank", "beyond float64"],
)
def test_what_no_alpha_is_has_none(scale: Scale, rank: int, stabilised: bool) -> None:
    assert exact_alpha(scale, rank, is_rank_stabilised=stabilised) is None


def test_a_tenth_is_no_alpha_of_single_precision() -> None:
    assert exact_alpha(scale_of(0.1), 8, single=True) is None
