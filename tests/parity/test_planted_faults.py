"""Faults planted in a right merge: which measure of parity catches each, and that replay catches them all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_deploy.evidence.parity_report import ParityReport
from lora_deploy.evidence.replay import replay
from lora_deploy.evidence.verdict import Verdict
from tests.parity.plans import Case, merged_case
from tests.peer.models import llama

SQUARE = "model.layers.1.self_attn.q_proj.weight"
pytestmark = pytest.mark.usefixtures("in_one_process")
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module", params=["float32", "float16", "bfloat16"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    model = llama(hidden_size=32, intermediate_size=48)
    return merged_case(model, config, tmp_path_factory.mktemp("case"), dtype=request.param)


@pytest.fixture(scope="module")
def base(case: Case) -> Tensors:
    return load_file(case.trained.base / "model.safetensors")


@pytest.fixture(scope="module")
def deltas(case: Case, base: Tensors) -> Tensors:
    exact = case.trained.merged()
    return {t.spec.name: exact[t.spec.name] - base[t.spec.name].double() for t in case.plan.tensors if t.updates}


def one_module_not_merged(base: Tensors, deltas: Tensors, merged: Tensors) -> Tensors:
    return {SQUARE: base[SQUARE]}


def scale_times_1_1(base: Tensors, deltas: Tensors, merged: Tensors) -> Tensors:
    return {name: base[name].double() + 1.1 * delta for name, delta in deltas.items()}


def one_layer_transposed(base: Tensors, deltas: Tensors, merged: Tensors) -> Tensors:
    return {SQUARE: base[SQUARE].double() + deltas[SQUARE].T}


def wrong_alpha(base: Tensors, deltas: Tensors, merged: Tensors) -> Tensors:
    return {name: base[name].double() + 2 * delta for name, delta in deltas.items()}


def half_a_shard_from_the_base(base: Tensors, deltas: Tensors, merged: Tensors) -> Tensors:
    return {name: base[name] for name in list(merged)[: len(merged) // 2]}


def measures_of(report: ParityReport) -> set[str]:
    """Name the measures by which a subject fails."""
    (subject,) = report.subjects
    (found,), (bound,) = subject.overall, subject.tolerances
    caught = {"mean": found.mean > bound.mean, "worst position": found.largest > bound.largest}
    caught["greedy"] = any(entry.verdict is Verdict.FAIL for entry in subject.greedy)
    return {name for name, is_caught in caught.items() if is_caught}


def test_a_right_merge_passes_far_below_the_tolerance(case: Case) -> None:
    report = case.parity()
    assert report.verdict is Verdict.PASS, report.reason
    assert measures_of(report) == set()
    (subject,) = report.subjects
    assert subject.overall[0].mean < 0.5 * subject.tolerances[0].mean
    assert replay(case.plan, case.merged.root, is_ours=True).verdict is Verdict.PASS


@pytest.mark.parametrize(
    "fault",
    [one_module_not_merged, scale_times_1_1, one_layer_transposed, wrong_alpha, half_a_shard_from_the_base],
    ids=lambda fault: fault.__name__,
)
def test_a_planted_fault_is_caught_by_mean_and_worst_position_and_by_replay(
    fault: Callable[[Tensors, Tensors, Tensors], Tensors], case: Case, base: Tensors, deltas: Tensors
) -> None:
    file = case.merged.root / "model.safetensors"
    right = file.read_bytes()
    merged = load_file(file)
    changed = fault(base, deltas, merged)
    dtype = merged[SQUARE].dtype
    try:
        save_file({**merged, **{n: t.to(dtype).contiguous() for n, t in changed.items()}}, file, {"format": "pt"})
        report = case.parity()
        replayed = replay(case.plan, case.merged.root, is_ours=True)
    finally:
        file.write_bytes(right)
    assert report.verdict is Verdict.FAIL
    assert {"mean", "worst position"} <= measures_of(report)
    if dtype is torch.float32:  # 16-bit rounding of so small a model may turn any choice
        assert "greedy" in measures_of(report)
    assert replayed.verdict is Verdict.FAIL


def test_the_base_passed_off_as_merged_fails_by_the_adapters_whole_effect(case: Case, tmp_path: Path) -> None:
    report = Case(trained=case.trained, plan=case.plan, merged=case.plan.binding.checkpoint).parity()
    assert report.verdict is Verdict.FAIL
    (subject,) = report.subjects
    assert subject.overall[0].mean == pytest.approx(report.effect[0].mean, rel=1e-3)
