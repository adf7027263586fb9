"""What a peer's arithmetic gives lies in the enclosure of its order, and nothing else does for long."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lora_deploy.evidence.enclosure import Enclosure
from lora_deploy.evidence.orders import Order, holds, known_orders
from lora_deploy.evidence.replayer import Replayer
from lora_deploy.merge.options import MergeOptions
from lora_deploy.merge.plan import PlannedTensor, plan_merge
from lora_deploy.rounding import dtype_of, torch_dtype
from lora_deploy.tensors import DType
from lora_deploy.updates.interface import Scale
from lora_deploy.updates.low_rank import LowRank
from lora_deploy.validate import bind
from tests.builders import adapter_of, make_checkpoint, module_update

NAME = "model.layers.0.mlp.up_proj.weight"
SCALE = math.sqrt(2)  # no short fraction, whose products with few bits are ties


class Case:
    def __init__(self, folder: Path, base: torch.dtype, factors: torch.dtype) -> None:
        self.weight = (0.05 * torch.randn(48, 40)).to(base)
        self.update = LowRank(
            down=torch.randn(8, 40).to(factors),
            up=(0.01 * torch.randn(48, 8)).to(factors),
            scale=Scale(factor=Fraction(SCALE), source="test"),
        )
        checkpoint = make_checkpoint(folder / "base", {NAME: self.weight}, {"model_type": "llama"})
        binding = bind([adapter_of(module_update(NAME, self.update))], checkpoint)
        self.planned: PlannedTensor = next(plan_merge(binding, MergeOptions(dtype="base")).tensors)
        self.replayer = Replayer(self.planned, checkpoint)

    def enclosure(self, order: Order) -> Enclosure:
        return self.replayer.enclose(order, torch.arange(self.weight.numel()))

    def computed(self, order: Order) -> Tensor:
        """What torch gives in this order."""
        work = torch_dtype(order.work)
        up, down = self.update.up, self.update.down
        if order.factors is not None:
            up, down = up.to(torch_dtype(order.factors)), down.to(torch_dtype(order.factors))
        product = torch_dtype(order.product)
        if order.scales_up_first:
            delta = ((up * SCALE).to(product) @ down.to(product)).to(product)
        else:
            delta = (up.float() @ down.float()).to(product) * SCALE
        for dtype in order.passes[0]:
            delta = delta.to(torch_dtype(dtype))
        weight = self.weight.to(work, copy=True)
        weight += delta
        return weight.to(self.weight.dtype)


DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("factors", DTYPES, ids=str)
@pytest.mark.parametrize("base", DTYPES, ids=str)
def test_torch_in_every_known_order_gives_what_its_enclosure_holds(
    base: torch.dtype, factors: torch.dtype, tmp_path: Path
) -> None:
    case = Case(tmp_path, base, factors)
    orders = known_orders(case.planned)
    assert len(orders) > 5
    for order in orders:
        values = case.computed(order).double().view(-1)
        assert bool(case.enclosure(order).contains(values).all()), order


@pytest.mark.parametrize("base", DTYPES[:2], ids=str)
def test_an_enclosure_is_nearly_always_one_value_and_else_a_step_of_weight_or_delta(
    base: torch.dtype, tmp_path: Path
) -> None:
    case = Case(tmp_path, base, torch.float32)
    terms = (case.weight.double().abs() + case.update.delta().abs()).view(-1)
    for order in known_orders(case.planned):
        found = case.enclosure(order)
        width = found.high - found.low
        assert (width == 0).double().mean() > 0.95, order
        assert bool((width <= 2.0**-6 * terms).all()), order


@pytest.mark.parametrize("base", DTYPES, ids=str)
def test_no_order_explains_a_single_element_left_at_a_base_value_that_shows(base: torch.dtype, tmp_path: Path) -> None:
    case = Case(tmp_path, base, torch.float32)
    for order in known_orders(case.planned):
        stored = case.computed(order).double().view(-1)
        start = case.weight.double().view(-1)
        position = int((stored - start).abs().argmax())
        stored[position] = start[position]
        misses = case.replayer.misses([order], torch.arange(stored.numel()), stored, most=64)[order]
        assert (misses.n_elements, misses.first) == (1, position)


def test_orders_that_change_nothing_are_listed_once(tmp_path: Path) -> None:
    case = Case(tmp_path, torch.float32, torch.float32)
    single = [order for order in known_orders(case.planned) if order.work is DType.F32]
    assert [str(order) for order in single] == ["weights in float32"]


def test_what_each_format_holds_of_the_others() -> None:
    floating = [DType.BF16, DType.F16, DType.F32, DType.F64]
    found = {(wide, narrow) for wide in floating for narrow in floating if wide is not narrow and holds(wide, narrow)}
    assert found == {
        (DType.F32, DType.BF16),
        (DType.F32, DType.F16),
        (DType.F64, DType.BF16),
        (DType.F64, DType.F16),
        (DType.F64, DType.F32),
    }


def test_enclosures_enclose_every_combination_of_their_ends() -> None:
    ends = torch.randn(4, 200, dtype=torch.float64)
    first = Enclosure(torch.minimum(ends[0], ends[1]), torch.maximum(ends[0], ends[1]))
    second = Enclosure(torch.minimum(ends[2], ends[3]), torch.maximum(ends[2], ends[3]))
    away = Enclosure(second.low.abs() + 1, second.low.abs() + 2)
    for a in (first.low, first.high, (first.low + first.high) / 2):
        for b in (second.low, second.high):
            assert bool((first + second).contains(a + b).all())
            assert bool((first - second).contains(a - b).all())
            assert bool((first * second).contains(a * b).all())
        assert bool((first / away).contains(a / away.low).all())
        assert bool((first / away).contains(a / away.high).all())
    assert bool(first.widened(0.5).contains(first.low - 0.5).all())


def test_what_is_not_finite_is_never_contained() -> None:
    everything = Enclosure(torch.tensor([-torch.inf] * 3).double(), torch.tensor([torch.inf] * 3).double())
    values = torch.tensor([torch.inf, torch.nan, 1.0], dtype=torch.float64)
    assert everything.contains(values).tolist() == [False, False, True]


def test_rounding_an_enclosure_rounds_its_ends() -> None:
    values = torch.randn(100, dtype=torch.float64)
    found = Enclosure(values - 1e-6, values + 1e-6).rounded(DType.BF16)
    assert dtype_of(found.low) is DType.F64
    assert bool(found.contains(values.to(torch.bfloat16).double()).all())
