"""Figures of an adapter, against the same figures of a Δ that is really formed."""

from fractions import Fraction
from math import sqrt
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_deploy import inspection
from lora_deploy.adapter import Experts
from lora_deploy.adapters.open import read_adapter
from lora_deploy.errors import Severity
from lora_deploy.inspection import ModuleReport, effective_rank, inspect_adapter, singular_values
from lora_deploy.updates import KINDS
from lora_deploy.updates.addition import Addition
from lora_deploy.updates.dora import Dora
from lora_deploy.updates.hadamard import Hadamard, Pair
from lora_deploy.updates.interface import Scale
from lora_deploy.updates.low_rank import LowRank
from lora_deploy.updates.replacement import Replacement
from tests.builders import adapter_of, low_rank, make_scale, module_update

EXAMPLE = Path(__file__).parents[2] / "examples" / "adapters" / "smollm2-json"


def report_of(update: object, tmp_path: Path) -> ModuleReport:
    (report,) = reports_of(tmp_path, update)
    return report


def reports_of(tmp_path: Path, *updates: object) -> tuple[ModuleReport, ...]:
    return inspected(tmp_path, *updates).modules


def inspected(tmp_path: Path, *updates: object) -> inspection.Inspection:
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(b"12345")
    entries = [module_update(f"layers.{i}.weight", update) for i, update in enumerate(updates)]
    return inspect_adapter(adapter_of(*entries, path=path))


def dense(update: LowRank) -> np.ndarray:
    """Form Δ in float64 with another library."""
    return update.scale.value * update.up.double().numpy() @ update.down.double().numpy()


def effective_rank_of_dense(delta: np.ndarray) -> float:
    values = np.linalg.svd(delta, compute_uv=False)
    shares = values[values > values[0] * 1e-13] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def from_factors(up: Tensor, down: Tensor, scale: float = 1.0) -> LowRank:
    return LowRank(down=down, up=up, scale=make_scale(scale))


@given(
    out=st.integers(1, 9), in_=st.integers(1, 9), rank=st.integers(1, 12), scale=st.sampled_from([0.5, -2.0, 1e-6, 300])
)
def test_norm_and_effective_rank_are_those_of_the_delta_that_is_formed(
    out: int, in_: int, rank: int, scale: float
) -> None:
    update = low_rank(out, in_, rank, scale)
    values = singular_values(update)
    assert len(values) <= rank
    assert float(values.square().sum().sqrt()) == pytest.approx(float(np.linalg.norm(dense(update))), rel=1e-12)
    assert effective_rank(values) == pytest.approx(effective_rank_of_dense(dense(update)), rel=1e-9)
    assert 1 - 1e-12 <= effective_rank(values) <= min(out, in_, rank) + 1e-12


def test_equal_singular_values_use_the_whole_rank() -> None:
    assert effective_rank(torch.full((4,), 0.3, dtype=torch.float64)) == pytest.approx(4)


def test_one_direction_has_effective_rank_one_whatever_the_rank() -> None:
    update = from_factors(torch.ones(5, 3), torch.ones(3, 7))
    assert effective_rank(singular_values(update)) == pytest.approx(1)


def test_effective_rank_is_the_exponential_of_the_entropy() -> None:
    # σ = 3, 1: exp(-(3/4 ln 3/4 + 1/4 ln 1/4)) = 4 / 3^(3/4)
    assert effective_rank(torch.tensor([3.0, 1.0], dtype=torch.float64)) == pytest.approx(4 / 3**0.75)


def test_figures_of_numbers_that_can_be_checked_by_hand(tmp_path: Path) -> None:
    update = from_factors(torch.tensor([[3.0], [4.0]]), torch.tensor([[0.0, 2.0, 0.0]]), 0.5)
    measured = report_of(update, tmp_path).measured
    assert (measured.down_norm, measured.up_norm) == (2.0, 5.0)
    assert measured.delta_norm == pytest.approx(5.0)
    assert measured.effective_rank == pytest.approx(1)
    assert (measured.shape, measured.rank, measured.dtype) == ((2, 3), 1, "float32")


def test_rounding_of_small_factors_does_not_reach_the_norm(tmp_path: Path) -> None:
    """A Gram matrix in float32 would lose this: the product of the factors' squares underflows."""
    up, down = torch.full((4, 2), 1e-30), torch.full((2, 4), 1e-30)
    update = from_factors(up, down)
    expected = float(np.linalg.norm(dense(update)))
    assert 0 < expected < 1e-58
    assert report_of(update, tmp_path).measured.delta_norm == pytest.approx(expected, rel=1e-12)


def test_an_update_with_a_zero_factor_is_untrained_and_uses_no_rank(tmp_path: Path) -> None:
    untrained = from_factors(torch.zeros(4, 2), torch.randn(2, 3))
    reports = reports_of(tmp_path, low_rank(4, 3), untrained)
    assert [report.measured.is_untrained for report in reports] == [False, True]
    assert (reports[1].measured.delta_norm, reports[1].measured.effective_rank) == (0.0, 0.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_adapter_with_values_that_are_no_numbers_is_reported_not_crashed_on(bad: float, tmp_path: Path) -> None:
    update = low_rank(4, 3)
    update.up[1, 1] = bad
    found = inspected(tmp_path, update)
    measured = found.modules[0].measured
    assert (measured.is_finite, measured.up_norm, measured.delta_norm, measured.effective_rank) == (
        False,
        None,
        None,
        None,
    )
    assert measured.down_norm is not None
    assert [(finding.code, finding.severity) for finding in found.findings] == [("non-finite", Severity.ERROR)]


def test_a_normalised_update_shows_its_low_rank_part(tmp_path: Path) -> None:
    inner = low_rank(4, 3)
    plain = report_of(inner, tmp_path).measured
    report = report_of(Dora(inner=inner, magnitude=torch.ones(4), axis="rows"), tmp_path)
    assert report.kind == "dora"
    assert report.measured == plain


def test_a_replacement_has_a_shape_and_no_delta(tmp_path: Path) -> None:
    measured = report_of(Replacement(values=torch.randn(3, 2).half()), tmp_path).measured
    assert (measured.shape, measured.dtype, measured.delta_norm, measured.rank) == ((3, 2), "float16", None, None)


def test_a_dense_difference_is_scaled(tmp_path: Path) -> None:
    measured = report_of(Addition(values=torch.tensor([3.0, 4.0]), scale=make_scale(-2)), tmp_path).measured
    assert measured.delta_norm == 10.0


def test_figures_of_a_stack_of_experts_are_of_all_its_experts(tmp_path: Path) -> None:
    n_experts, rank = 3, 2
    scale = Scale(factor=Fraction(1, 2), source="test")
    stack = Experts(
        down=torch.randn(rank * n_experts, 4),
        up=torch.randn(5, rank * n_experts),
        nesting=0,
        scales={"gate_up_proj": scale},
        ranks={"gate_up_proj": rank},
    )
    report = report_of(stack, tmp_path)
    deltas = [dense(stack.expert("gate_up_proj", e)) for e in range(n_experts)]
    assert report.kind == "experts"
    assert report.measured.delta_norm == pytest.approx(sqrt(sum(np.linalg.norm(delta) ** 2 for delta in deltas)))
    expected = np.mean([effective_rank_of_dense(delta) for delta in deltas])
    assert report.measured.effective_rank == pytest.approx(expected, rel=1e-9)


def test_a_stack_whose_parameter_only_the_base_tells_has_no_scale_yet(tmp_path: Path) -> None:
    scales = {"up": make_scale(1), "down": make_scale(2)}
    stack = Experts(down=torch.randn(4, 4), up=torch.randn(5, 4), nesting=0, scales=scales, ranks={"up": 2, "down": 2})
    measured = report_of(stack, tmp_path).measured
    assert (measured.scale, measured.delta_norm) == (None, None)
    assert measured.up_norm is not None


@pytest.mark.parametrize("entry", KINDS, ids=lambda entry: entry.name)
def test_every_kind_of_update_has_figures(entry: object) -> None:
    measure = inspection._measured
    assert measure.dispatch(entry.load()) is not measure.dispatch(object)


def test_a_real_adapter_is_measured_whole() -> None:
    found = inspect_adapter(read_adapter(EXAMPLE))
    assert found.base_hint.name == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert len(found.modules) == 210
    assert all(1 <= module.measured.effective_rank <= 4 for module in found.modules)
    assert {module.measured.dtype for module in found.modules} == {"float16"}
    assert {module.measured.scale.source for module in found.modules} == {"lora_alpha 8 / r 4 (adapter_config.json)"}
    assert found.findings == ()


def test_what_a_nested_kind_is_made_of_is_measured(tmp_path: Path) -> None:
    """LoHa's four factors lie in two pairs."""
    pair = Pair(up=torch.ones(4, 2, dtype=torch.bfloat16), down=torch.ones(2, 3, dtype=torch.bfloat16))
    found = report_of(Hadamard(first=pair, second=pair, scale=make_scale()), tmp_path)
    assert (found.measured.dtype, found.measured.shape) == ("bfloat16", (4, 3))
