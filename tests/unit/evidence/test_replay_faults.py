"""Every planted fault of a foreign merge gets an outcome of its own; a healthy one passes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lora_deploy.adapter import Adapter
from lora_deploy.errors import MalformedCheckpointError
from lora_deploy.evidence.outcome import Outcome, TensorOutcome
from lora_deploy.evidence.replay import ReplayReport, replay
from lora_deploy.evidence.verdict import Verdict
from lora_deploy.merge.options import MergeOptions
from lora_deploy.merge.plan import MergePlan, plan_merge
from lora_deploy.updates.dora import Dora
from lora_deploy.updates.interface import Scale
from lora_deploy.updates.low_rank import LowRank
from lora_deploy.updates.residual import Residual
from lora_deploy.validate import bind
from tests.builders import adapter_of, make_checkpoint, module_update

Tensors = dict[str, Tensor]
CONFIG = {"model_type": "llama", "tie_word_embeddings": False}
Q, K, UP, DOWN, NORM, HEAD = (
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.self_attn.k_proj.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.0.mlp.down_proj.weight",
    "model.norm.weight",
    "lm_head.weight",
)
SHAPES = {Q: (64, 64), K: (64, 64), UP: (96, 64), DOWN: (64, 96)}
RANK, ALPHA = 3, 6
SCALE = ALPHA / RANK


class World:
    """A base, an adapter on four of its matrices, and the tensors that another tool would store."""

    def __init__(self, folder: Path, dtype: torch.dtype, size: float) -> None:
        self.folder = folder
        self.dtype = dtype
        shapes = {**SHAPES, NORM: (64,), HEAD: (128, 64)}
        self.base: Tensors = {name: (0.05 * torch.randn(shape)).to(dtype) for name, shape in shapes.items()}
        self.low_ranks = {
            name: LowRank(
                down=torch.randn(RANK, in_),
                up=size * torch.randn(out, RANK),
                scale=Scale(factor=Fraction(ALPHA, RANK), source="test"),
            )
            for name, (out, in_) in SHAPES.items()
        }
        self.checkpoint = make_checkpoint(folder / "base", self.base, CONFIG)

    def delta(self, name: str) -> Tensor:
        update = self.low_ranks[name]
        return SCALE * (update.up @ update.down)

    def plain(self) -> Tensors:
        return {n: (w.float() + self.delta(n)).to(self.dtype) if n in SHAPES else w for n, w in self.base.items()}

    def adapter(self) -> Adapter:
        return adapter_of(*(module_update(name, update) for name, update in self.low_ranks.items()))

    def plan(self) -> MergePlan:
        return plan_merge(bind([self.adapter()], self.checkpoint), MergeOptions(dtype="base", n_workers=2))

    def replayed(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any] = CONFIG) -> ReplayReport:
        make_checkpoint(self.folder / "merged", tensors, config)
        return replay(self.plan(), self.folder / "merged")


@pytest.fixture(params=[(torch.bfloat16, 0.01), (torch.bfloat16, 1e-4), (torch.float16, 0.01), (torch.float32, 0.01)])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> World:
    return World(tmp_path, *request.param)


def entry(report: ReplayReport, name: str) -> TensorOutcome:
    return next(found for found in report.outcomes if found.name == name)


def only_fault(report: ReplayReport, name: str) -> TensorOutcome:
    assert report.verdict is Verdict.FAIL
    faults = [found for found in report.outcomes if not found.outcome.is_sound]
    assert [found.name for found in faults] == [name], faults
    return faults[0]


def test_a_float32_sum_rounded_once_passes(world: World) -> None:
    report = world.replayed(world.plain())
    assert report.verdict is Verdict.PASS
    assert entry(report, NORM).outcome is Outcome.EXACT
    assert set(report.counts) <= {Outcome.EXACT, Outcome.ROUNDED}


def test_one_module_that_was_not_merged_is_not_applied(world: World) -> None:
    fault = only_fault(world.replayed(world.plain() | {Q: world.base[Q]}), Q)
    assert fault.outcome is Outcome.NOT_APPLIED
    assert fault.factor == 0


@pytest.mark.parametrize(
    ("factor", "meaning"),
    [
        (2.0, "twice"),
        (0.5, "scale 1 instead of 2"),
        (-1.0, "subtracted"),
        (math.sqrt(RANK), "alpha / sqrt(r) instead of alpha / r"),
        (RANK, "alpha instead of alpha / r"),
        (1.37, ""),
    ],
)
def test_a_wrong_scale_is_estimated_and_named(world: World, factor: float, meaning: str) -> None:
    merged = (world.base[UP].float() + factor * world.delta(UP)).to(world.dtype)
    fault = only_fault(world.replayed(world.plain() | {UP: merged}), UP)
    assert fault.outcome is Outcome.WRONG_SCALE
    assert fault.factor == pytest.approx(factor, rel=0.05)
    assert meaning in fault.message


def test_alpha_over_r_where_its_root_was_trained_is_named(world: World) -> None:
    root = Scale(factor=Fraction(ALPHA), root=RANK, source="test")
    world.low_ranks[UP] = replace(world.low_ranks[UP], scale=root)
    tensors = world.plain()  # with alpha / r
    fault = only_fault(world.replayed(tensors), UP)
    assert fault.outcome is Outcome.WRONG_SCALE
    assert fault.factor == pytest.approx(1 / math.sqrt(RANK), rel=0.05)
    assert "alpha / r instead of alpha / sqrt(r)" in fault.message


def test_the_transposed_update_of_a_square_matrix_is_recognised(world: World) -> None:
    merged = (world.base[Q].float() + world.delta(Q).T).to(world.dtype)
    assert only_fault(world.replayed(world.plain() | {Q: merged}), Q).outcome is Outcome.WRONG_ORIENTATION


def test_two_modules_whose_updates_were_swapped_name_each_other(world: World) -> None:
    swapped = {Q: K, K: Q}
    merged = {n: (world.base[n].float() + world.delta(other)).to(world.dtype) for n, other in swapped.items()}
    report = world.replayed(world.plain() | merged)
    assert report.verdict is Verdict.FAIL
    for name, other in swapped.items():
        assert entry(report, name).outcome is Outcome.ANOTHER_TENSOR
        assert f"holds the update of {other}" in entry(report, name).message


def test_two_merged_tensors_under_each_others_names_are_recognised(world: World) -> None:
    tensors = world.plain()
    report = world.replayed(tensors | {Q: tensors[K], K: tensors[Q]})
    assert entry(report, Q).outcome is Outcome.ANOTHER_TENSOR
    assert entry(report, Q).message == f"holds {K}"


def test_a_missing_and_an_extra_tensor_are_named(world: World) -> None:
    tensors = world.plain()
    del tensors[UP]
    report = world.replayed(tensors | {"model.surprise.weight": torch.zeros(3)})
    assert report.verdict is Verdict.FAIL
    assert entry(report, UP).outcome is Outcome.MISSING
    assert entry(report, "model.surprise.weight").outcome is Outcome.EXTRA


def test_a_changed_tensor_that_no_adapter_changes_is_named(world: World) -> None:
    changed = (world.base[NORM].float() * 1.5).to(world.dtype)
    assert only_fault(world.replayed(world.plain() | {NORM: changed}), NORM).outcome is Outcome.CHANGED


def test_an_update_on_a_tensor_that_is_not_its_target_names_the_target(world: World) -> None:
    extra = torch.zeros(128, 64)
    extra[:96] = world.delta(UP)
    shifted = (world.base[HEAD].float() + extra).to(world.dtype)
    fault = only_fault(world.replayed(world.plain() | {HEAD: shifted}), HEAD)
    assert fault.outcome is Outcome.CHANGED
    assert fault.n_different > 0


@pytest.mark.parametrize("bit", [1, 8, 13])
@pytest.mark.parametrize("name", [Q, NORM])
def test_one_flipped_bit_is_one_altered_element(world: World, bit: int, name: str) -> None:
    tensors = world.plain()
    tensors[name] = tensors[name].clone()
    is_single = world.dtype is torch.float32  # whose lowest bits differ from product to product
    tensors[name].view(-1).view(torch.int32 if is_single else torch.int16)[37] ^= 1 << (bit + 8 * is_single)
    fault = only_fault(world.replayed(tensors), name)
    assert fault.outcome is (Outcome.ALTERED if name == Q else Outcome.CHANGED)
    assert fault.message.startswith("1 of ")
    assert ("[0, 37]" if name == Q else "[37]") in fault.message


def test_a_tensor_of_which_half_was_left_at_the_base_is_partly_applied(world: World) -> None:
    tensors = world.plain()
    merged = torch.cat([tensors[UP][:48], world.base[UP][48:]])
    fault = only_fault(world.replayed(tensors | {UP: merged}), UP)
    assert fault.outcome is Outcome.PARTLY_APPLIED
    assert fault.fraction == pytest.approx(0.5, abs=0.1)


def test_half_a_shard_from_the_base_is_not_applied_there(world: World) -> None:
    report = world.replayed(world.plain() | {UP: world.base[UP], DOWN: world.base[DOWN]})
    found = {found.name: found.outcome for found in report.outcomes}
    assert found[UP] is found[DOWN] is Outcome.NOT_APPLIED
    assert found[Q].is_sound
    assert found[K].is_sound


def test_noise_is_unexplained(world: World) -> None:
    noise = (world.base[UP].float() + 0.05 * torch.randn(96, 64)).to(world.dtype)
    assert only_fault(world.replayed(world.plain() | {UP: noise}), UP).outcome is Outcome.UNEXPLAINED


def test_a_turned_shape_is_named(world: World) -> None:
    tensors = world.plain()
    fault = only_fault(world.replayed(tensors | {UP: tensors[UP].T.contiguous()}), UP)
    assert fault.outcome is Outcome.WRONG_SHAPE
    assert "transposed" in fault.message


def test_a_tensor_of_integers_is_of_the_wrong_dtype(world: World) -> None:
    packed = torch.zeros(96, 64, dtype=torch.uint8)
    assert only_fault(world.replayed(world.plain() | {UP: packed}), UP).outcome is Outcome.WRONG_DTYPE


def test_a_nan_is_not_finite(world: World) -> None:
    merged = world.plain()[UP].clone()
    merged[:8] = math.nan
    assert only_fault(world.replayed(world.plain() | {UP: merged}), UP).outcome is Outcome.NOT_FINITE


def test_names_behind_a_wrapper_are_found(world: World) -> None:
    wrapped = {f"base_model.model.{name}": tensor for name, tensor in world.plain().items()}
    report = world.replayed(wrapped)
    assert report.verdict is Verdict.PASS
    assert {found.name for found in report.outcomes} == set(world.base)


def test_a_cast_of_an_untouched_tensor_is_no_change(tmp_path: Path) -> None:
    world = World(tmp_path, torch.float32, 0.01)
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in world.plain().items()}
    report = world.replayed(tensors)
    assert report.verdict is Verdict.PASS
    assert entry(report, NORM).outcome is Outcome.EXACT


def test_a_tensor_cast_on_the_way_through_another_dtype_is_rounded(tmp_path: Path) -> None:
    world = World(tmp_path, torch.float32, 0.01)
    loaded = world.base[NORM].to(torch.bfloat16).to(torch.float32)
    report = world.replayed(world.plain() | {NORM: loaded})
    assert report.verdict is Verdict.PASS
    assert entry(report, NORM).order == "weights in bfloat16"


class TestTooSmallToShow:
    def test_an_update_below_the_dtypes_step_is_inconclusive(self, tmp_path: Path) -> None:
        world = World(tmp_path, torch.bfloat16, 1e-12)
        report = world.replayed(world.base)
        assert report.verdict is Verdict.INCONCLUSIVE
        assert {entry(report, name).outcome for name in SHAPES} == {Outcome.INCONCLUSIVE}

    def test_an_untrained_adapter_is_no_question(self, tmp_path: Path) -> None:
        world = World(tmp_path, torch.bfloat16, 0.0)
        assert world.replayed(world.base).verdict is Verdict.PASS

    def test_one_invisible_tensor_with_the_definitions_bytes_harms_nothing(self, tmp_path: Path) -> None:
        world = World(tmp_path, torch.bfloat16, 0.01)
        world.low_ranks[Q] = replace(world.low_ranks[Q], up=1e-12 * world.low_ranks[Q].up)
        report = world.replayed(world.plain())
        assert entry(report, Q).outcome is Outcome.INCONCLUSIVE
        assert report.verdict is Verdict.PASS

    def test_bytes_that_only_a_coarser_order_allows_cannot_be_checked(self, tmp_path: Path) -> None:
        """Every delta is 2^-11 (1 + 2^-12): above half a step of 1.0; rounded to float16 first, it is half a step."""
        base = torch.ones(64, 64, dtype=torch.float16)
        update = LowRank(
            down=torch.ones(1, 64),
            up=torch.full((64, 1), 2.0**-11 * (1 + 2.0**-12)),
            scale=Scale(factor=Fraction(1), source="test"),
        )
        checkpoint = make_checkpoint(tmp_path / "base", {Q: base}, CONFIG)
        plan = plan_merge(bind([adapter_of(module_update(Q, update))], checkpoint), MergeOptions(dtype="base"))
        make_checkpoint(tmp_path / "merged", {Q: base}, CONFIG)
        report = replay(plan, tmp_path / "merged")
        assert entry(report, Q).outcome is Outcome.INCONCLUSIVE
        assert entry(report, Q).n_different == 64 * 64
        assert report.verdict is Verdict.INCONCLUSIVE


def test_a_tied_model_merged_on_both_sides_is_told_from_one_that_was_untied(tmp_path: Path) -> None:
    tied = {"model_type": "llama", "tie_word_embeddings": True, "architectures": ["LlamaForCausalLM"]}
    embedding = 0.05 * torch.randn(40, 16)
    checkpoint = make_checkpoint(tmp_path / "base", {"model.embed_tokens.weight": embedding}, tied)
    update = LowRank(
        down=torch.randn(2, 16), up=0.1 * torch.randn(40, 2), scale=Scale(factor=Fraction(1), source="test")
    )
    binding = bind([adapter_of(module_update(HEAD, update))], checkpoint)
    plan = plan_merge(binding, MergeOptions(dtype="base"))
    make_checkpoint(tmp_path / "merged", {"model.embed_tokens.weight": embedding + update.up @ update.down}, tied)
    report = replay(plan, tmp_path / "merged")
    assert report.verdict is Verdict.FAIL
    assert entry(report, HEAD).outcome.is_sound
    side = entry(report, "model.embed_tokens.weight")
    assert side.outcome is Outcome.CHANGED
    assert "not untied" in side.message
    assert HEAD in side.message
    assert entry(report, "config.json:tie_word_embeddings").outcome is Outcome.WRONG_CONFIG


def test_the_second_of_two_adapters_that_is_not_there_is_named(tmp_path: Path) -> None:
    world = World(tmp_path, torch.bfloat16, 0.01)
    second = adapter_of(module_update(UP, replace(world.low_ranks[UP], up=0.01 * torch.randn(96, RANK))))
    plan = plan_merge(bind([world.adapter(), second], world.checkpoint), MergeOptions(dtype="base"))
    make_checkpoint(tmp_path / "merged", world.plain(), CONFIG)
    fault = only_fault(replay(plan, tmp_path / "merged"), UP)
    assert fault.outcome is Outcome.PARTLY_APPLIED
    assert fault.message == "the update of adapter 2 of 2 is not there"


def test_faults_are_reported_by_name_and_figure_in_json(tmp_path: Path) -> None:
    world = World(tmp_path, torch.bfloat16, 0.01)
    merged = (world.base[UP].float() + 2 * world.delta(UP)).to(world.dtype)
    report = world.replayed(world.plain() | {UP: merged}).to_json()
    fault = next(found for found in report["tensors"] if found["name"] == UP)
    assert fault["outcome"] == "wrong-scale"
    assert fault["factor"] == 2.0
    assert report["counts"]["wrong-scale"] == 1
    assert "order of rounding" in report["tolerance"]


class TestLeftOut:
    """A kind of update that was merged as if it were a plain low-rank one."""

    def replayed(self, world: World, update: Any) -> TensorOutcome:
        plan = plan_merge(
            bind([adapter_of(module_update(Q, update))], world.checkpoint), MergeOptions(dtype="base", n_workers=1)
        )
        make_checkpoint(world.folder / "merged", world.base | {Q: world.plain()[Q]}, CONFIG)
        return only_fault(replay(plan, world.folder / "merged"), Q)

    def test_the_magnitude_of_dora(self, world: World) -> None:
        magnitude = 1.2 * world.base[Q].float().norm(dim=1)
        fault = self.replayed(world, Dora(inner=world.low_ranks[Q], magnitude=magnitude, axis="rows"))
        assert fault.outcome is Outcome.WRONG_FORMULA
        assert "dora" in fault.message

    def test_the_residual_of_pissa(self, world: World) -> None:
        fault = self.replayed(world, Residual(low_rank=world.low_ranks[Q], method="pissa"))
        assert fault.outcome is Outcome.WRONG_FORMULA
        assert "residual" in fault.message


TIED = {"model_type": "llama", "tie_word_embeddings": True, "architectures": ["LlamaForCausalLM"]}
EMBEDDING = "model.embed_tokens.weight"


class TestSharedAndComputedTensors:
    @pytest.fixture
    def plan(self, tmp_path: Path) -> MergePlan:
        tensors = {EMBEDDING: torch.randn(40, 16), Q: torch.randn(16, 16)}
        checkpoint = make_checkpoint(tmp_path / "base", tensors, TIED)
        update = LowRank(down=torch.randn(2, 16), up=torch.randn(16, 2), scale=Scale(factor=Fraction(1), source="test"))
        return plan_merge(bind([adapter_of(module_update(Q, update))], checkpoint), MergeOptions(dtype="base"))

    def merged(self, plan: MergePlan) -> Tensors:
        update = plan.binding.updates[Q][0].update
        assert isinstance(update, LowRank)
        tensors = load_file(plan.binding.checkpoint.root / "model.safetensors")
        return tensors | {Q: tensors[Q] + update.up @ update.down}

    def test_a_tied_matrix_that_is_stored_twice_is_compared_twice(self, plan: MergePlan, tmp_path: Path) -> None:
        tensors = self.merged(plan)
        make_checkpoint(tmp_path / "same", tensors | {HEAD: tensors[EMBEDDING].clone()}, TIED)
        report = replay(plan, tmp_path / "same")
        assert report.verdict is Verdict.PASS
        assert entry(report, HEAD).outcome is Outcome.EXACT
        make_checkpoint(tmp_path / "other", tensors | {HEAD: tensors[EMBEDDING] + 1}, TIED)
        assert only_fault(replay(plan, tmp_path / "other"), HEAD).outcome is Outcome.CHANGED

    def test_buffers_that_the_model_computes_are_ignored(self, plan: MergePlan, tmp_path: Path) -> None:
        buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
        make_checkpoint(tmp_path / "merged", self.merged(plan) | {buffer: torch.randn(4)}, TIED)
        report = replay(plan, tmp_path / "merged")
        assert report.verdict is Verdict.PASS
        assert entry(report, buffer).outcome is Outcome.IGNORED

    def test_a_folder_that_is_not_there_is_not_taken_for_a_hub_id(self, plan: MergePlan) -> None:
        with pytest.raises(MalformedCheckpointError, match="no such folder"):
            replay(plan, Path("owner/name"))
