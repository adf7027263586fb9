"""Law 1: every merged element is the exact real value of the stored numbers, rounded once to nearest even."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_deploy.errors import NonFiniteTensorError
from lora_deploy.merge.exact import BlockFacts, merge_rows
from lora_deploy.merge.factors import Factors
from lora_deploy.merge.workspace import Workspace
from lora_deploy.rounding import largest
from lora_deploy.tensors import DType, Place, Region
from lora_deploy.updates.interface import Scale
from lora_deploy.updates.low_rank import LowRank
from tests.exact_oracle import TORCH, decode, exact_sum, infinity_bits, merged_exactly, nearest, same_float

COMPILED, EXACT = (importlib.import_module(f"lora_deploy.merge.{name}") for name in ("compiled", "exact"))
CPU = torch.device("cpu")
FLOATS = [DType.F16, DType.BF16, DType.F32, DType.F64]


class Way:
    """How every merge of this module is computed: tile by tile, or in one compiled pass where that can be."""

    is_compiled = False


@pytest.fixture(autouse=True, scope="module", params=[False, True], ids=["tiles", "one-pass"])
def _way(request: pytest.FixtureRequest) -> None:
    Way.is_compiled = request.param


def workspace() -> Workspace:
    return Workspace(CPU, is_compiled=Way.is_compiled)


def merge(weight: Tensor, updates: Sequence[LowRank], dtype: DType) -> tuple[Tensor, BlockFacts]:
    return merge_rows(place_of(weight), weight, Factors(updates, CPU), slice(0, len(weight)), dtype, workspace())


def place_of(weight: Tensor) -> Place:
    return Place("w", tuple(weight.shape), Region.whole(tuple(weight.shape)))


def update_of(up: Tensor, down: Tensor, scale: Fraction | float = 1, root: int = 1) -> LowRank:
    return LowRank(up=up, down=down, scale=Scale(factor=Fraction(scale), root=root, source="test"))


def assert_exact(weight: Tensor, updates: Sequence[LowRank], dtype: DType) -> BlockFacts:
    """Compare every element, and the refusal when one exceeds the format, with the rational result."""
    expected = merged_exactly(weight, updates, dtype)
    if any(math.isinf(value) for row in expected for value in row):
        with pytest.raises(NonFiniteTensorError, match="exceeds"):
            merge(weight, updates, dtype)
        return BlockFacts()
    merged, facts = merge(weight, updates, dtype)
    for i, row in enumerate(expected):
        for j, value in enumerate(row):
            assert same_float(float(merged[i, j]), value), (i, j, float(merged[i, j]), value)
    values = [abs(value) for row in expected for value in row]
    assert facts.max_abs == max(values, default=0.0)
    zeros = [(i, j) for i, row in enumerate(expected) for j, value in enumerate(row) if value == 0]
    assert facts.n_underflowed == sum(exact_sum(weight, updates, i, j) != 0 for i, j in zeros)
    return facts


class Maker:
    """Random matrices of one kind from one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def few_bits(self, *shape: int) -> Tensor:
        """Numbers of two bits at a few magnitudes: sums of them often lie half way between two numbers."""
        exponents = torch.randint(-13, -4, shape, generator=self.generator)
        return torch.randint(-3, 4, shape, generator=self.generator) * 2.0 ** exponents.double()

    def sparse(self, values: Tensor) -> Tensor:
        """Put zeros of both signs in a third of the places."""
        places = torch.rand(values.shape, generator=self.generator)
        return torch.where(places < 0.17, 0.0, torch.where(places > 0.83, -0.0, values))


SCALES = st.one_of(
    st.sampled_from([Fraction(1), Fraction(2), Fraction(-1, 2), Fraction(0), Fraction(16), Fraction(1, 3)]),
    st.floats(1e-30, 1e30, allow_subnormal=False).map(Fraction),
)


@st.composite
def merges(draw: st.DrawFn) -> tuple[Tensor, list[LowRank], DType]:
    """Draw a small merge of any dtypes: ordinary, full of ties, cancelling, sparse, or at an end of a range."""
    maker = Maker(draw(st.integers(0, 2**32)))
    n_rows, n_cols = draw(st.integers(1, 7)), draw(st.integers(1, 9))
    base, dtype = draw(st.sampled_from(FLOATS)), draw(st.sampled_from(FLOATS))
    kind = draw(st.sampled_from(["ordinary", "ties", "ties", "cancelling", "sparse", "least", "largest"]))
    updates = []
    for _ in range(draw(st.integers(1, 3))):
        factor = TORCH[draw(st.sampled_from(FLOATS))]
        rank, root = draw(st.integers(0, 5)), draw(st.sampled_from([1, 1, 3, 8, 9]))
        make = maker.few_bits if kind == "ties" else maker.normal
        up, down = make(n_rows, rank), make(rank, n_cols)
        if kind == "sparse":
            up, down = maker.sparse(up), maker.sparse(down)
        scale = draw(st.sampled_from([Fraction(1), Fraction(2), Fraction(-1, 4)])) if kind == "ties" else draw(SCALES)
        updates.append(update_of(up.to(factor), down.to(factor), scale, 1 if kind == "ties" else root))
    weight = maker.few_bits(n_rows, n_cols) if kind == "ties" else maker.normal(n_rows, n_cols)
    if kind == "sparse":
        weight = maker.sparse(weight)
    elif kind == "least":
        weight *= decode(2, min(base, dtype, key=largest))
    elif kind == "largest":
        weight = weight.clamp(-1, 1) * largest(dtype) * 1.001
    weight = weight.clamp(-largest(base), largest(base)).to(TORCH[base])
    if kind == "cancelling":
        delta = sum((u.delta() for u in updates), torch.zeros(n_rows, n_cols, dtype=torch.float64))
        weight = (-delta).clamp(-largest(base), largest(base)).to(TORCH[base])
    return weight, updates, dtype


@settings(max_examples=800)
@given(merges())
def test_every_element_is_the_exact_value_rounded_once(case: tuple[Tensor, list[LowRank], DType]) -> None:
    assert_exact(*case)


@settings(max_examples=250)
@given(merges(), st.sampled_from([0, 10**9]))
def test_compensated_and_rational_arithmetic_give_the_same(case: tuple[Tensor, list[LowRank], DType], few: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EXACT, "_FEW", few)
        assert_exact(*case)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("factor", FLOATS)
def test_a_realistic_block_is_exact_where_float64_alone_is_most_likely_wrong(factor: DType, dtype: DType) -> None:
    maker = Maker(1)
    weight = (maker.normal(96, 160) * 0.02).to(torch.bfloat16)
    up, down = (maker.normal(96, 16) * 0.01).to(TORCH[factor]), (maker.normal(16, 160) * 0.02).to(TORCH[factor])
    updates = [update_of(up, down, 16, 8)]
    merged, _ = merge(weight, updates, dtype)
    plain = (weight.double() + updates[0].delta()).to(TORCH[dtype])
    doubtful = (merged != plain).nonzero().tolist()
    for row, col in [*doubtful, *torch.randint(0, 96, (150, 2), generator=maker.generator).tolist()]:
        assert same_float(float(merged[row, col]), nearest(exact_sum(weight, updates, row, col), dtype))


def test_the_order_of_the_ranks_changes_no_bit() -> None:
    """As another BLAS, tile or device would add in another order."""
    maker = Maker(2)
    weight = (maker.normal(64, 64) * 0.02).to(torch.bfloat16)
    up, down = maker.normal(64, 32).float(), maker.normal(32, 64).float()
    for dtype in FLOATS:
        found = {
            merge(weight, [update_of(up[:, order], down[order], 0.1)], dtype)[0].view(torch.uint8).numpy().tobytes()
            for order in (torch.arange(32), torch.arange(31, -1, -1), torch.randperm(32, generator=maker.generator))
        }
        assert len(found) == 1


def column(*values: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype)[:, None]


def row(*values: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype)[None, :]


def test_more_ties_than_rationals_are_asked_for_go_to_the_even_neighbour() -> None:
    weight = torch.ones(8, 8, dtype=torch.bfloat16)
    up = column(*([2.0**-8, 3 * 2.0**-8] * 4))  # half a unit above 1, and half a unit above the next number
    facts = assert_exact(weight, [update_of(up, torch.ones(1, 8, dtype=torch.float64))], DType.BF16)
    assert facts.n_exact == 0


def test_a_tie_that_only_a_product_of_full_floats_breaks_is_decided_by_its_last_bit() -> None:
    tie, hair = 2.0**-8, 2.0**-100
    up = torch.tensor([[tie, hair], [tie, -hair], [tie, 0.0]], dtype=torch.float64)
    weight = torch.ones(3, 1, dtype=torch.bfloat16)
    merged, _ = merge(weight, [update_of(up, torch.ones(2, 1, dtype=torch.float64))], DType.BF16)
    assert merged[:, 0].tolist() == [1 + 2.0**-7, 1.0, 1.0]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("few", [0, 8])
def test_what_remains_of_a_deep_cancellation_is_not_taken_for_the_sum_itself(
    dtype: DType, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compensated sum is 0 or nearly so while its error bound is not: both its ends round alike, and are wrong."""
    monkeypatch.setattr(EXACT, "_FEW", few)
    a = 1 + 2.0**-52
    up = torch.tensor([[a, -1.0, 2.0**-104, 2.0**-100, -(2.0**-100), -(2.0**-160)]] * 2, dtype=torch.float64)
    down = torch.tensor([[1 - 2.0**-52, 1.0, 1.0, a, a, 1.0]] * 3, dtype=torch.float64).T.contiguous()
    assert_exact(torch.zeros(2, 3), [update_of(up, down)], dtype)
    assert_exact(torch.zeros(2, 3), [update_of(-up, down, Fraction(1, 3))], dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_factors_that_underflow_in_float64_still_count(dtype: DType) -> None:
    """s·up is below every float64 number, yet times down it is more than half a unit of the weight."""
    up, down = column(1e-300, -1e-300), row(1e300, 1e290)
    weight = torch.tensor([[0.0, 1.0], [1.0, -0.0]])
    assert_exact(weight, [update_of(up, down, 1e-30), update_of(up, down, 1e-20)], dtype)
    assert_exact(weight, [update_of(up, down, 1e-3)], dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_partial_sums_beyond_float64_do_not_spoil_a_finite_result(dtype: DType) -> None:
    up, down = torch.tensor([[1e160, -1e160, 1.0]], dtype=torch.float64), torch.ones(3, 2, dtype=torch.float64)
    down[:2] = 1e160
    assert_exact(torch.ones(1, 2, dtype=torch.float64), [update_of(up, down)], dtype)
    weight = torch.full((1, 2), -1.7e308, dtype=torch.float64)
    large = update_of(column(2.0**150), row(2.0**150, 2.0**150), 2.0**200)
    half = update_of(-large.up, large.down, 2.0**199)
    assert_exact(weight, [half, large, half], dtype)


@pytest.mark.parametrize("dtype", [DType.F16, DType.BF16, DType.F32])
def test_the_value_where_rounding_to_infinity_begins_is_a_boundary_like_others(dtype: DType) -> None:
    half_step = (largest(dtype) - decode(infinity_bits(dtype) - 2, dtype)) / 2
    weight = torch.full((1, 1), largest(dtype), dtype=torch.float64)
    ones = torch.ones(2, 1, dtype=torch.float64)
    below = update_of(torch.tensor([[half_step, -(2.0**-90)]], dtype=torch.float64), ones)
    assert float(merge(weight, [below], dtype)[0]) == largest(dtype)
    for hair in (0.0, 2.0**-90):
        above = update_of(torch.tensor([[half_step, hair]], dtype=torch.float64), ones)
        with pytest.raises(NonFiniteTensorError, match="exceeds"):
            merge(weight, [above], dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_sum_of_zero_is_positive_and_a_negative_value_that_underflows_is_not(dtype: DType) -> None:
    weight = torch.tensor([[-0.0, 1.0, -1.0, 0.0]], dtype=torch.float64)
    up, down = column(-1.0), row(0.0, 1.0, -1.0, -0.0)
    facts = assert_exact(weight, [update_of(up, down)], dtype)
    assert torch.signbit(merge(weight, [update_of(up, down)], dtype)[0]).sum() == 0
    assert facts.n_exact <= 2  # those that cancel; plain zeros are settled before
    if dtype is not DType.F64:
        tiny = update_of(up, row(2.0**-160, -(2.0**-160), 0.0, 0.0))
        merged, facts = merge(torch.zeros(1, 4), [tiny], dtype)
        assert torch.signbit(merged).tolist() == [[True, False, False, False]]
        assert facts.n_underflowed == 2


@pytest.mark.parametrize("dtype", [DType.F16, DType.BF16, DType.F32])
def test_a_hair_decides_beside_a_tie_among_the_smallest_numbers(dtype: DType) -> None:
    """For bfloat16 those are float32's smallest too: nothing may depend on stepping from one of these to the next."""
    step = Fraction(decode(1, dtype))
    ties = [(k + Fraction(1, 2)) * step for k in (0, 1, 2, 5, 120)]
    values = [float(tie * (1 + Fraction(hair, 2**50))) for tie in ties for hair in (-1, 0, 1)]
    weight = torch.tensor([values, [-value for value in values]], dtype=torch.float64)
    assert_exact(weight, [update_of(torch.zeros(2, 1), torch.ones(1, len(values)))], dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (0, 3), (3, 0)])
@pytest.mark.parametrize("rank", [0, 1])
def test_the_smallest_shapes_merge(shape: tuple[int, int], rank: int, dtype: DType) -> None:
    weight = torch.randn(shape)
    update = update_of(torch.randn(shape[0], rank), torch.randn(rank, shape[1]))
    facts = assert_exact(weight, [update], dtype)
    assert facts.n_elements == weight.numel()


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_without_an_update_are_the_rounded_base_beside_rows_with_a_huge_one(dtype: DType) -> None:
    up = column(0.0, 4e4, 0.0, -0.0, dtype=torch.float16)
    down = row(1.0, 1e-3, 0.0, dtype=torch.float16)
    weight = torch.tensor([[1e-8, -1e-8, 1e-30], [0.1, -3.0, 7.0], [2.0**-25, 1 + 2.0**-8, 0.0], [1, 2, 3]])
    assert_exact(weight, [update_of(up, down)], dtype)


def test_an_error_bound_beyond_float16_leaves_every_element_to_the_finer_levels() -> None:
    up = torch.tensor([[2.0**60, 2.0**60]] * 3)
    down = torch.tensor([[2.0**60, -(2.0**59)], [-(2.0**60), 2.0**59]])
    weight = torch.tensor([[1 + 2.0**-11, -7e-6], [3.0, 0.0], [-(2.0**-25), 1e-4]])
    assert_exact(weight, [update_of(up, down)], DType.F16)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_factors_that_are_no_numbers_are_refused_by_name(value: float, dtype: DType) -> None:
    for up, down in [(column(1.0, value), row(1.0, 0.0)), (column(1.0, 0.0), row(0.0, value))]:
        with pytest.raises(NonFiniteTensorError, match=r"^w: the update's factors"):
            merge(torch.ones(2, 2), [update_of(up, down)], dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_adapted_weight_that_is_no_number_is_refused_by_its_place(value: float, dtype: DType) -> None:
    weight = torch.ones(3, 4)
    weight[1, 2] = value
    with pytest.raises(NonFiniteTensorError, match=rf"^w: element \[1, 2\] of the base is {value}"):
        merge(weight, [update_of(torch.ones(3, 1), torch.ones(1, 4))], dtype)


def test_a_value_too_large_for_float16_is_refused_with_its_size_and_place() -> None:
    weight = torch.zeros(3, 4)
    weight[2, 1] = 60000
    update = update_of(torch.ones(3, 1), torch.full((1, 4), 6000.0))
    with pytest.raises(NonFiniteTensorError, match=r"^w: element \[2, 1\]: merged value 66000 .*65504") as caught:
        merge(weight, [update], DType.F16)
    assert caught.value.hint == "--dtype base"


def test_rows_of_a_region_know_their_place() -> None:
    weight, update = torch.randn(6, 4), update_of(torch.randn(6, 2), torch.randn(2, 4), 0.7)
    whole, _ = merge(weight, [update], DType.BF16)
    part, _ = merge_rows(place_of(weight), weight[2:5], Factors([update], CPU), slice(2, 5), DType.BF16, workspace())
    assert torch.equal(part, whole[2:5])
    weight[4, 3] = math.nan
    with pytest.raises(NonFiniteTensorError, match=r"element \[4, 3\]"):
        merge_rows(place_of(weight), weight[2:5], Factors([update], CPU), slice(2, 5), DType.BF16, workspace())


BASES, RESULTS = [DType.F16, DType.BF16, DType.F32], [DType.F16, DType.BF16]


@pytest.mark.parametrize("rank", [1, 4, 5, 16, 64])
@pytest.mark.parametrize("spread", [1e-9, 1e-5, 0.02, 30.0])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("result", RESULTS)
def test_one_pass_and_tiles_give_the_same_bytes_and_facts(base: DType, result: DType, spread: float, rank: int) -> None:
    """From float16's underflow to large numbers, over several blocks of columns, the last of them not full."""
    maker = Maker(rank)
    weight = (maker.normal(40, 700) * spread).to(TORCH[base])
    up, down = (maker.normal(40, rank) * spread).to(torch.bfloat16), (maker.normal(rank, 700) * 0.02).float()
    factors, rows = Factors([update_of(up, down, 2)], CPU), slice(0, 40)
    found = [
        merge_rows(place_of(weight), weight, factors, rows, result, Workspace(CPU, is_compiled=is_compiled))
        for is_compiled in (False, True)
    ]
    assert torch.equal(found[0][0].view(torch.int16), found[1][0].view(torch.int16))
    tiles, one_pass = found[0][1], found[1][1]
    assert (one_pass.max_abs, one_pass.n_underflowed) == (tiles.max_abs, tiles.n_underflowed)
    assert one_pass.weight_square == pytest.approx(tiles.weight_square, rel=1e-4)
    assert one_pass.error_square == pytest.approx(tiles.error_square, rel=1e-2)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("result", RESULTS)
def test_one_pass_leaves_next_to_nothing_open_in_an_ordinary_block(base: DType, result: DType) -> None:
    maker = Maker(7)
    weight = (maker.normal(200, 1000) * 0.02).to(TORCH[base])
    update = update_of((maker.normal(200, 16) * 0.02).float(), (maker.normal(16, 1000) * 0.02).float(), 2)
    merged = torch.empty(weight.shape, dtype=TORCH[result])
    found = COMPILED.merge_in_one_pass(weight, merged, Factors([update], CPU), slice(0, 200))
    assert found is not None
    assert len(found.positions) <= 20


def test_one_pass_declines_a_block_of_ties_alone() -> None:
    weight = torch.ones(64, 256, dtype=torch.bfloat16)
    ties = update_of(torch.full((64, 1), 2.0**-8), torch.ones(1, 256))
    factors = Factors([ties], CPU)
    assert COMPILED.merge_in_one_pass(weight, torch.empty_like(weight), factors, slice(0, 64)) is None
    assert_exact(weight[:4], [ties.rows(slice(0, 4))], DType.BF16)


def test_facts_are_those_of_the_matrices() -> None:
    maker = Maker(4)
    weight = (maker.normal(40, 30) * 0.02).to(torch.bfloat16)
    weight[3] = 0
    update = update_of((maker.normal(40, 4) * 0.01).float(), maker.normal(4, 30).float(), 2)
    update.up[3] = 0  # a row of exact zeros must not make any figure meaningless
    for dtype in FLOATS:
        merged, facts = merge(weight, [update], dtype)
        exact = weight.double() + update.delta()
        assert facts.weight_square == pytest.approx(float(weight.double().square().sum()))
        assert Factors([update], CPU).delta_square == pytest.approx(float(update.delta().square().sum()))
        error = float((merged.double() - exact).square().sum())
        assert facts.error_square == pytest.approx(error, rel=1e-2, abs=1e-30)
        assert facts.n_elements == 1200
