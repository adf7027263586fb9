"""Rounding once, to nearest even: on every boundary between two 16-bit numbers, and against rationals."""

from __future__ import annotations

import math
import random
from decimal import Decimal, localcontext
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from lora_deploy.errors import UnmergeableAdapterError
from lora_deploy.rounding import BITS, dtype_of, largest, round_fraction, round_once, round_pair
from lora_deploy.tensors import DType
from lora_deploy.updates.interface import Scale
from tests.exact_oracle import TORCH, decode, infinity_bits, nearest, same_float

HALF = [DType.F16, DType.BF16]
ALL = [DType.F16, DType.BF16, DType.F32, DType.F64]


def neighbours(dtype: DType) -> tuple[Tensor, Tensor, Tensor]:
    """Every non-negative 16-bit number, the next one, and the float64 half way between; infinity comes last."""
    bits = torch.arange(infinity_bits(dtype), dtype=torch.int16)
    below, above = bits.view(TORCH[dtype]), (bits + 1).view(TORCH[dtype])
    wide = above.double()
    wide[-1] = 2 * below.double()[-1] - below.double()[-2]
    return below, above, (below.double() + wide) / 2


def assert_bits(found: Tensor, expected: Tensor) -> None:
    wide = BITS[dtype_of(expected)]
    assert torch.equal(found.view(wide), expected.view(wide))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", HALF)
def test_every_boundary_of_16_bits_rounds_to_the_even_neighbour(dtype: DType, sign: int) -> None:
    below, above, boundary = neighbours(dtype)
    is_even = (below.view(torch.int16) & 1) == 0
    assert_bits(round_once(sign * boundary, dtype), sign * torch.where(is_even, below, above))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", HALF)
def test_a_last_place_of_float64_decides_beside_every_boundary_of_16_bits(dtype: DType, sign: int) -> None:
    below, above, boundary = neighbours(dtype)
    assert_bits(round_once(sign * torch.nextafter(boundary, torch.zeros(())), dtype), sign * below)
    assert_bits(round_once(sign * torch.nextafter(boundary, 2 * boundary), dtype), sign * above)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", HALF)
def test_every_16_bit_number_and_what_lies_beside_it_rounds_to_itself(dtype: DType, sign: int) -> None:
    below = neighbours(dtype)[0]
    for moved in (below.double(), torch.nextafter(below.double(), torch.zeros(())), below.double() * (1 + 2**-40)):
        assert_bits(round_once(sign * moved, dtype), sign * below)


@pytest.mark.parametrize("dtype", HALF)
def test_a_rest_below_float64_decides_on_every_boundary(dtype: DType) -> None:
    below, above, boundary = neighbours(dtype)
    rest = boundary * 2.0**-60
    is_even = (below.view(torch.int16) & 1) == 0
    for sign in (1, -1):
        assert_bits(round_pair(sign * boundary, -sign * rest, dtype), sign * below)
        assert_bits(round_pair(sign * boundary, sign * rest, dtype), sign * above)
        assert_bits(round_pair(sign * boundary, 0 * rest, dtype), sign * torch.where(is_even, below, above))
        beside = torch.nextafter(boundary, torch.zeros(()))
        assert_bits(round_pair(sign * beside, sign * rest, dtype), sign * below)
        for beside in (torch.nextafter(boundary, torch.zeros(())), torch.nextafter(boundary, 2 * boundary)):
            on_boundary = round_pair(sign * beside, sign * (boundary - beside), dtype)
            assert_bits(on_boundary, sign * torch.where(is_even, below, above))


@pytest.mark.parametrize("dtype", ALL)
def test_infinities_and_nan_round_to_themselves(dtype: DType) -> None:
    values = torch.tensor([math.inf, -math.inf, math.nan], dtype=torch.float64)
    for rounded in (round_once(values, dtype), round_pair(values, torch.zeros(3, dtype=torch.float64), dtype)):
        assert rounded.tolist()[:2] == [math.inf, -math.inf]
        assert math.isnan(rounded[2])


@pytest.mark.parametrize("dtype", ALL)
def test_zero_keeps_its_sign_and_what_underflows_does_too(dtype: DType) -> None:
    tiny = decode(1, dtype) / 4 if dtype is not DType.F64 else 0.0
    values = torch.tensor([0.0, -0.0, tiny, -tiny], dtype=torch.float64)
    assert [math.copysign(1, value) for value in round_once(values, dtype).tolist()] == [1, -1, 1, -1]
    assert not round_once(values, dtype).any()


def near_numbers(dtype: DType) -> st.SearchStrategy[Fraction]:
    """Rationals on, at or beside a boundary of the format, and anywhere."""
    bits = st.integers(0, infinity_bits(dtype) - 1)
    part = st.sampled_from([Fraction(0), Fraction(1, 2), Fraction(1, 4), Fraction(3, 4)])
    off = st.sampled_from([Fraction(0), Fraction(1, 3 << 200), -Fraction(1, 3 << 200)])

    def between(low: int, share: Fraction, offset: Fraction, sign: int) -> Fraction:
        below = Fraction(decode(low, dtype))
        above = Fraction(decode(low + 1, dtype)) if low + 1 < infinity_bits(dtype) else 2 * below
        return sign * (below + share * (above - below) + offset * (above - below))

    return st.builds(between, bits, part, off, st.sampled_from([1, -1]))


@pytest.mark.parametrize("dtype", ALL)
def test_a_rational_rounds_to_the_nearest_number(dtype: DType) -> None:
    @given(near_numbers(dtype))
    def check(value: Fraction) -> None:
        assert same_float(round_fraction(value, dtype), nearest(value, dtype))

    check()


@pytest.mark.parametrize("dtype", [DType.F16, DType.BF16, DType.F32])
def test_a_float64_rounds_to_the_nearest_number(dtype: DType) -> None:
    chosen = random.Random(3)
    limit = infinity_bits(dtype)
    values = []
    for _ in range(400):
        low = chosen.choice([chosen.randrange(limit - 1), chosen.randrange(40), limit - 1 - chosen.randrange(3)])
        below, above = decode(low, dtype), decode(min(low + 1, limit - 1), dtype)
        share = chosen.choice([0.5, 0.5, 0.25, 0.499999, chosen.random()])
        at = below + share * (above - below)
        values += [
            sign * beside for sign in (1, -1) for beside in (at, math.nextafter(at, 0), math.nextafter(at, math.inf))
        ]
    values += [largest(dtype) * factor for factor in (1, 1 + 2**-13, 1.01, 4)]
    found = round_once(torch.tensor(values, dtype=torch.float64), dtype)
    for value, rounded in zip(values, found.tolist(), strict=True):
        assert same_float(rounded, nearest(Fraction(value), dtype)), value


@pytest.mark.parametrize("dtype", ALL)
def test_a_pair_rounds_as_its_exact_sum(dtype: DType) -> None:
    chosen = random.Random(5)
    limit = infinity_bits(dtype)
    pairs = []
    for _ in range(400):
        low = chosen.choice([chosen.randrange(1, limit - 1), chosen.randrange(1, 40), limit - 2])
        below, above = decode(low, dtype), decode(low + 1, dtype)
        high = below + chosen.choice([0.0, 0.5, 1.0]) * (above - below)
        rest = chosen.choice([0.0, 0.5, -0.5, 2**-30, -(2**-30), 0.99, -0.99]) * math.ulp(high)
        pairs.append((chosen.choice([1, -1]) * high, rest))
    high, rest = (torch.tensor(part, dtype=torch.float64) for part in zip(*pairs, strict=True))
    for (a, b), rounded in zip(pairs, round_pair(high, rest, dtype).tolist(), strict=True):
        assert same_float(rounded, nearest(Fraction(a) + Fraction(b), dtype)), (a, b)


def test_torch_itself_would_round_twice() -> None:
    """Why round_once exists: were this to change, half of the module could go."""
    value = torch.tensor([1 + 2**-8 + 2**-40], dtype=torch.float64)
    assert float(value.to(torch.bfloat16)) == 1
    assert float(round_once(value, DType.BF16)) == 1 + 2**-7


@given(
    alpha=st.floats(1e-3, 1e6), rank=st.integers(1, 4096), weight=st.floats(-100, 100), times=st.sampled_from([1, 2])
)
@example(alpha=16.0, rank=8, weight=1.0, times=1)
@example(alpha=16.0, rank=9, weight=0.1, times=2)
def test_a_rank_stabilised_scale_is_the_float64_nearest_to_it(
    alpha: float, rank: int, weight: float, times: int
) -> None:
    factor = times * Fraction(alpha) * Fraction(weight)
    with localcontext() as context:
        context.prec = 400
        root = (Decimal(factor.numerator) / Decimal(factor.denominator)) / Decimal(rank).sqrt()
        expected = float(Fraction(root))
    assert Scale(factor=factor, root=rank, source="test").value == expected


def test_a_scale_a_hair_above_a_tie_rounds_up_however_thin_the_hair() -> None:
    tie = Fraction(2**53 + 1)  # between two float64 numbers, the lower of them even
    for sign in (1, -1):
        factor = Fraction(math.isqrt(int(2 * tie**2) << 600) + 1, 1 << 300)  # sqrt(2)·tie, rounded up at 2^-300
        assert Scale(factor=sign * factor, root=2, source="test").value == sign * float(2**53 + 2)
        below = factor - Fraction(2, 1 << 300)
        assert Scale(factor=sign * below, root=2, source="test").value == sign * float(2**53)


def test_a_scale_of_a_square_rank_is_the_plain_fraction() -> None:
    assert Scale(factor=Fraction(16), root=9, source="test").value == 16 / 3
    assert Scale(factor=Fraction(16), root=16, source="test").value == 4
    assert Scale(factor=Fraction(0), root=8, source="test").value == 0


def test_a_scale_beyond_float64_is_refused_with_where_it_came_from() -> None:
    with pytest.raises(UnmergeableAdapterError, match=r"scale alpha of the test: exceeds float64's range"):
        _ = Scale(factor=Fraction(10) ** 400, root=3, source="alpha of the test").value
