"""Binding: names, shapes and orientations of single updates, the options, and all misfits at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_deploy.adapter import Adapter, BaseHint, ModuleUpdate, Naming, Orientation
from lora_deploy.checkpoint import Checkpoint, CheckpointRef
from lora_deploy.errors import Finding, IncompatibleAdapterError, RecipeError, Severity
from lora_deploy.tensors import Region
from lora_deploy.updates.addition import Addition
from lora_deploy.updates.dora import Dora
from lora_deploy.updates.low_rank import LowRank
from lora_deploy.updates.replacement import Replacement
from lora_deploy.updates.token_rows import TokenRows
from lora_deploy.validate import BindOptions, bind
from tests.builders import (
    adapter_of,
    linear_adapter,
    low_rank,
    make_checkpoint,
    make_scale,
    merged_values,
    module_update,
)

Q = "model.layers.0.self_attn.q_proj.weight"
UP = "model.layers.0.mlp.up_proj.weight"
LLAMA = {"model_type": "llama", "tie_word_embeddings": False}


def llama(folder: Path, **more: Tensor) -> Checkpoint:
    return make_checkpoint(folder, {Q: torch.randn(4, 4), UP: torch.randn(6, 4), **more}, LLAMA)


def stored(target: str, update: Any) -> ModuleUpdate:
    return module_update(target, update, Orientation.STORED)


def misfits(*args: Any, **kwargs: Any) -> tuple[Finding, ...]:
    with pytest.raises(IncompatibleAdapterError) as caught:
        bind(*args, **kwargs)
    assert caught.value.exit_code == 4
    return tuple(finding for finding in caught.value.findings if finding.severity is Severity.ERROR)


def codes(findings: tuple[Finding, ...]) -> list[str]:
    return [finding.code for finding in findings]


def test_updates_of_linear_layers_are_bound_with_their_region(tmp_path: Path) -> None:
    checkpoint = llama(tmp_path)
    adapter = linear_adapter({UP: (6, 4), Q: (4, 4)})
    binding = bind([adapter], checkpoint)
    assert binding.outputs == {name: name for name in checkpoint.tensors}
    assert [*binding.updates] == [name for name in checkpoint.tensors if name in {Q, UP}]
    (bound,) = binding.updates[UP]
    assert bound.region == Region(offset=0, n_rows=6, n_cols=4)
    assert bound.orientation is Orientation.STORED
    assert bound.update is adapter.updates[0].update
    assert binding.config_edits == {}
    assert binding.findings == ()


def test_every_misfit_is_told_at_once(tmp_path: Path) -> None:
    adapter = linear_adapter({UP: (8, 4), "model.layers.0.mlp.gate_up_proj.weight": (12, 4), "other.weight": (1, 1)})
    found = misfits([adapter], llama(tmp_path))
    assert sorted(codes(found)) == ["shape-mismatch", "target-missing", "target-missing"]


def test_the_message_says_what_was_found_and_what_expected(tmp_path: Path) -> None:
    checkpoint = replace(
        llama(tmp_path), ref=CheckpointRef(name="meta-llama/Llama-3.2-1B", revision="4e20de3" + "0" * 33)
    )
    keys = (f"base_model.model.{UP[:-7]}.lora_A.weight", f"base_model.model.{UP[:-7]}.lora_B.weight")
    adapter = adapter_of(
        replace(module_update(UP, low_rank(8, 4)), keys=keys),
        replace(module_update("model.layers.0.mlp.gate_up_proj.weight", low_rank(12, 4)), keys=("k",)),
        path=Path("runs/7/adapter_model.safetensors"),
        base_hint=BaseHint(name="meta-llama/Llama-3.2-3B"),
    )
    with pytest.raises(IncompatibleAdapterError) as caught:
        bind([adapter], checkpoint)
    assert caught.value.message.splitlines() == [
        "adapter runs/7 (peft) does not fit base meta-llama/Llama-3.2-1B@4e20de3: 2 errors, 1 warning",
        "  error target-missing  model.layers.0.mlp.gate_up_proj.weight: not in base; nearest: up_proj",
        "                        from k",
        "  error shape-mismatch  model.layers.0.mlp.up_proj.weight: update is (8, 4), base is (6, 4)",
        "                        from base_model.model.model.layers.0.mlp.up_proj.lora_{A,B}.weight",
        "  warn  other-base      test: names base meta-llama/Llama-3.2-3B, this one is meta-llama/Llama-3.2-1B",
    ]
    assert caught.value.hint == "the adapter names base meta-llama/Llama-3.2-3B; pass --base meta-llama/Llama-3.2-3B"


def test_a_long_list_of_misfits_is_cut_in_the_message_and_whole_in_the_findings(tmp_path: Path) -> None:
    adapter = linear_adapter({f"x.{k}.weight": (1, 1) for k in range(100)})
    with pytest.raises(IncompatibleAdapterError) as caught:
        bind([adapter], llama(tmp_path))
    assert len(caught.value.findings) == 100
    assert "… and 60 more" in caught.value.message.splitlines()[-1]


# ------------------------------------------------------------------------------------------------------- orientations


@pytest.mark.parametrize(
    ("shape", "config", "name", "is_turned"),
    [
        ((4, 12), {"model_type": "gpt2"}, "transformer.h.0.attn.c_attn.weight", True),
        ((4, 4), {"model_type": "gpt2"}, "transformer.h.0.attn.c_proj.weight", True),
        ((4, 4), {"model_type": "gpt2"}, "score.weight", False),
        ((4, 4), {"model_type": "gpt_bigcode"}, "transformer.h.0.attn.c_proj.weight", False),
        ((4, 4), {"model_type": "llama"}, Q, False),
        (
            (4, 4),
            {"model_type": "vision-encoder-decoder", "decoder": {"model_type": "gpt2"}},
            "d.h.0.mlp.c_fc.weight",
            True,
        ),
        ((4, 12), {}, "h.0.attn.c_attn.weight", True),
        ((12, 4), {}, "m.weight", False),
    ],
)
def test_the_base_decides_the_orientation(
    tmp_path: Path, shape: tuple[int, int], config: dict[str, Any], name: str, is_turned: bool
) -> None:
    checkpoint = make_checkpoint(tmp_path, {name: torch.zeros(shape)}, config)
    out, in_ = shape[::-1] if is_turned else shape
    update = low_rank(out, in_)
    binding = bind([adapter_of(module_update(name, update))], checkpoint)
    expected = update.delta().T if is_turned else update.delta()
    assert torch.allclose(merged_values(binding)[name], expected)


@pytest.mark.parametrize("flag", [True, False, None])
def test_a_square_module_of_an_unknown_model_is_linear_unless_the_adapter_says_otherwise(
    tmp_path: Path, flag: bool | None
) -> None:
    checkpoint = make_checkpoint(tmp_path, {"m.weight": torch.zeros(4, 4)})
    update = low_rank(4, 4)
    adapter = adapter_of(module_update("m.weight", update), config={"fan_in_fan_out": flag})
    binding = bind([adapter], checkpoint)
    assert [f.code for f in binding.findings] == ["assumed-layout"]
    assert torch.allclose(merged_values(binding)["m.weight"], update.delta().T if flag else update.delta())


def test_the_flag_is_not_believed_where_the_base_says_otherwise(tmp_path: Path) -> None:
    checkpoint = llama(tmp_path)
    update = low_rank(4, 4)
    adapter = adapter_of(module_update(Q, update), config={"fan_in_fan_out": True})
    (bound,) = bind([adapter], checkpoint).updates[Q]
    assert bound.update is update


def test_a_layout_that_only_its_transpose_fits_is_taken_and_told(tmp_path: Path) -> None:
    update = low_rank(4, 6)
    binding = bind([adapter_of(module_update(UP, update))], llama(tmp_path))
    assert [f.code for f in binding.findings] == ["transposed-by-shape"]
    assert binding.updates[UP][0].update.shape == (6, 4)


def test_what_a_format_fixes_is_never_turned(tmp_path: Path) -> None:
    assert codes(misfits([adapter_of(stored(UP, low_rank(4, 6)))], llama(tmp_path))) == ["shape-mismatch"]


# -------------------------------------------------------------------------------------------------- shapes and dtypes


def test_a_convolution_is_a_matrix_of_its_kernels(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, {"c.weight": torch.zeros(5, 3, 2, 2)}, LLAMA)
    (bound,) = bind([adapter_of(stored("c.weight", low_rank(5, 12)))], checkpoint).updates["c.weight"]
    assert bound.region == Region(offset=0, n_rows=5, n_cols=12)


def test_a_one_by_one_kernel_fits_a_linear_layer_and_the_reverse(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, {"a.weight": torch.zeros(5, 3), "b.weight": torch.zeros(5, 3, 1, 1)}, LLAMA)
    adapter = adapter_of(
        stored("a.weight", low_rank(5, 3)),
        stored("b.weight", Replacement(values=torch.ones(5, 3))),
    )
    binding = bind([adapter], checkpoint)
    assert merged_values(binding)["b.weight"].shape == (5, 3, 1, 1)


def test_a_grouped_convolution_is_refused_with_its_groups(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, {"c.weight": torch.zeros(6, 2, 3)}, LLAMA)
    (found,) = misfits([adapter_of(stored("c.weight", low_rank(6, 12)))], checkpoint)
    assert found.code == "grouped-convolution"
    assert "2 groups" in found.message


def test_a_region_that_the_reader_gave_is_kept(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, {"c.conv.weight": torch.zeros(4, 3, 2, 2)}, LLAMA)
    region = Region(offset=0, n_rows=8, n_cols=6)
    update = replace(stored("c.conv.weight", low_rank(8, 6)), region=region)
    (bound,) = bind([adapter_of(update)], checkpoint).updates["c.conv.weight"]
    assert bound.region == region
    too_large = replace(update, region=Region(offset=0, n_rows=9, n_cols=6))
    assert codes(misfits([adapter_of(too_large)], checkpoint)) == ["shape-mismatch"]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float8_e4m3fn])
def test_packed_weights_take_no_update(tmp_path: Path, dtype: torch.dtype) -> None:
    checkpoint = make_checkpoint(tmp_path, {UP: torch.zeros(6, 4).to(dtype)}, LLAMA)
    assert codes(misfits([linear_adapter({UP: (6, 4)})], checkpoint)) == ["packed-dtype"]


def test_attention_with_a_fused_input_projection_has_no_weight_suffix(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, {"attn.in_proj_weight": torch.zeros(6, 2)}, LLAMA)
    for target in ("attn.in_proj_weight", "attn.weight"):
        assert [*bind([linear_adapter({target: (6, 2)})], checkpoint).updates] == ["attn.in_proj_weight"]


def test_a_bare_parameter_is_found(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, {"mixer.A_log": torch.zeros(3, 2)}, LLAMA)
    assert [*bind([linear_adapter({"mixer.A_log": (3, 2)})], checkpoint).updates] == ["mixer.A_log"]


def test_a_trained_bias_of_a_base_without_one_is_an_error(tmp_path: Path) -> None:
    bias = UP.replace("weight", "bias")
    addition = Addition(values=torch.ones(6), scale=make_scale())
    (found,) = misfits([adapter_of(stored(bias, addition))], llama(tmp_path))
    assert found.code == "bias-missing"
    assert codes(misfits([adapter_of(stored(bias, Replacement(values=torch.ones(6))))], llama(tmp_path))) == [
        "bias-missing"
    ]


@pytest.mark.parametrize(("name", "axis", "n"), [("c_attn", "columns", 12), ("lm_head", "rows", 5)])
def test_a_magnitude_follows_the_layout_and_must_fit_it(tmp_path: Path, name: str, axis: str, n: int) -> None:
    tensors = {"h.0.attn.c_attn.weight": torch.randn(4, 12), "lm_head.weight": torch.randn(5, 4)}
    checkpoint = make_checkpoint(tmp_path, tensors, {"model_type": "gpt2", "tie_word_embeddings": False})
    full = next(key for key in tensors if name in key)
    update = Dora(inner=low_rank(n, 4), magnitude=torch.rand(n), axis="rows")
    (bound,) = bind([adapter_of(module_update(full, update))], checkpoint).updates[full]
    assert isinstance(bound.update, Dora)
    assert bound.update.axis == axis
    wrong = replace(update, magnitude=torch.rand(n + 1))
    assert codes(misfits([adapter_of(module_update(full, wrong))], checkpoint)) == ["magnitude-mismatch"]


def test_a_part_of_fused_rows_is_a_region(tmp_path: Path) -> None:
    name = "encoder.layers.0.attn.Wqkv"
    tensors = {f"{name}.weight": torch.randn(6, 2), f"{name}.bias": torch.randn(6)}
    checkpoint = make_checkpoint(tmp_path, tensors, {"model_type": "nomic_bert"})
    update = low_rank(2, 2)
    adapter = adapter_of(
        module_update("layers.0.self_attn.k_proj.weight", update),
        stored("layers.0.self_attn.v_proj.bias", Replacement(values=torch.tensor([7.0, 8.0]))),
    )
    merged = merged_values(bind([adapter], checkpoint))
    expected = tensors[f"{name}.weight"].double()
    expected[2:4] += update.delta()
    assert torch.allclose(merged[f"{name}.weight"], expected)
    assert merged[f"{name}.bias"][4:].tolist() == [7, 8]
    assert torch.equal(merged[f"{name}.bias"][:4], tensors[f"{name}.bias"][:4].double())


def test_names_of_two_versions_in_one_tower_are_an_error(tmp_path: Path) -> None:
    q = "language_model.model.layers.{}.self_attn.q_proj.weight"
    tower = "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"
    tensors = {q.format(k): torch.zeros(4, 4) for k in range(2)} | {tower: torch.zeros(4, 4)}
    checkpoint = make_checkpoint(tmp_path, tensors, {"model_type": "llava"})
    new = "model.language_model.layers.1.self_attn.q_proj.weight"
    mixed = linear_adapter({q.format(0): (4, 4), new: (4, 4)})
    assert codes(misfits([mixed], checkpoint)) == ["mixed-names"]
    of_two_towers = linear_adapter({tower: (4, 4), new: (4, 4)})
    assert [*bind([of_two_towers], checkpoint).updates] == [q.format(1), tower]


def test_a_name_that_fits_two_tensors_is_ambiguous(tmp_path: Path) -> None:
    tensors = {"bert.pooler.dense.weight": torch.zeros(2, 2), "pooler.dense.weight": torch.zeros(2, 2)}
    checkpoint = make_checkpoint(tmp_path, tensors, {"model_type": "bert"})
    adapter = linear_adapter({"_orig_mod.pooler.dense.weight": (2, 2)})
    assert codes(misfits([adapter], checkpoint)) == ["ambiguous-target"]


# -------------------------------------------------------------------------------------------------------------- options


def test_weights_multiply_the_change(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, {UP: torch.zeros(6, 4)}, LLAMA)
    one, two = linear_adapter({UP: (6, 4)}), linear_adapter({UP: (6, 4)})
    binding = bind([one, two], checkpoint, BindOptions(weights=(0.25, -2.0)))
    deltas = [update.update.delta() for update in (one.updates[0], two.updates[0])]  # type: ignore[union-attr]
    assert torch.allclose(merged_values(binding)[UP], 0.25 * deltas[0] - 2 * deltas[1])
    assert [bound.adapter_index for bound in binding.updates[UP]] == [0, 1]


def test_what_cannot_be_weighted_is_told(tmp_path: Path) -> None:
    head = stored("score.weight", Replacement(values=torch.zeros(2, 4)))
    found = misfits([adapter_of(head, module_update(UP, low_rank(6, 4)))], llama(tmp_path), BindOptions(weights=(0.5,)))
    assert codes(found) == ["weight"]


def test_as_many_weights_as_adapters_are_needed(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="2 weights for 1 adapters"):
        bind([linear_adapter({UP: (6, 4)})], llama(tmp_path), BindOptions(weights=(1.0, 1.0)))


def test_include_and_exclude_leave_keys_out_by_tensor_name(tmp_path: Path) -> None:
    adapter = linear_adapter({UP: (6, 4), Q: (4, 4)})
    checkpoint = llama(tmp_path)
    binding = bind([adapter], checkpoint, BindOptions(exclude=("*.mlp.*",)))
    assert [*binding.updates] == [Q]
    assert binding.excluded == adapter.updates[0].keys
    assert [*bind([adapter], checkpoint, BindOptions(include=("*.mlp.*",))).updates] == [UP]
    both = BindOptions(include=("model.*",), exclude=(Q,))
    assert [*bind([adapter], checkpoint, both).updates] == [UP]


def test_what_is_excluded_need_not_fit(tmp_path: Path) -> None:
    adapter = linear_adapter({UP: (9, 9), Q: (4, 4)})
    assert [*bind([adapter], llama(tmp_path), BindOptions(exclude=(UP,))).updates] == [Q]


def test_what_is_excluded_need_not_be_in_the_base(tmp_path: Path) -> None:
    adapter = linear_adapter({"model.layers.9.mlp.up_proj.weight": (6, 4), Q: (4, 4)})
    binding = bind([adapter], llama(tmp_path), BindOptions(exclude=("model.layers.9.*",)))
    assert [*binding.updates] == [Q]
    assert binding.excluded == adapter.updates[0].keys


@pytest.mark.parametrize("options", [BindOptions(include=("*.nothing",)), BindOptions(exclude=("model",))])
def test_a_pattern_that_matches_nothing_is_an_error(tmp_path: Path, options: BindOptions) -> None:
    with pytest.raises(RecipeError, match="matches none of the 1 tensors"):
        bind([linear_adapter({UP: (6, 4)})], llama(tmp_path), options)


# ----------------------------------------------------------------------------------------------------------- token rows


@pytest.mark.parametrize("index", [4, -1])
def test_token_rows_outside_the_embedding_are_an_error(tmp_path: Path, index: int) -> None:
    name = "model.embed_tokens.weight"
    checkpoint = llama(tmp_path, **{name: torch.zeros(4, 2)})
    rows = TokenRows(indices=(1, index), values=torch.ones(2, 2))
    assert codes(misfits([adapter_of(stored(name, rows))], checkpoint)) == ["token-outside"]
    narrow = TokenRows(indices=(1,), values=torch.ones(1, 3))
    assert codes(misfits([adapter_of(stored(name, narrow))], checkpoint)) == ["shape-mismatch"]


def test_token_rows_learn_how_many_rows_there_are(tmp_path: Path) -> None:
    name = "model.embed_tokens.weight"
    checkpoint = llama(tmp_path, **{name: torch.zeros(4, 2)})
    rows = TokenRows(indices=(3, 1), values=torch.tensor([[3.0, 3], [1, 1]]))
    binding = bind([adapter_of(stored(name, rows))], checkpoint)
    assert binding.updates[name][0].update.shape == (4, 2)
    assert merged_values(binding)[name].tolist() == [[0, 0], [1, 1], [0, 0], [3, 3]]


# ----------------------------------------------------------------------------------------------------- which base it is


@pytest.mark.parametrize(
    ("named", "base", "config", "expected"),
    [
        ("owner/Tiny", "owner/Tiny", {}, []),
        ("owner/Tiny", "other/tiny", {}, []),
        ("owner/Tiny", "/data/Tiny", {}, []),
        ("/home/me/Tiny/", "owner/Tiny", {}, []),
        ("C:\\models\\Tiny", "owner/Tiny", {}, []),
        ("owner/Tiny", "/data/base", {"_name_or_path": "owner/Tiny"}, []),
        ("owner/Tiny", "/data/tiny.Q4_K_M.gguf", {}, []),
        ("owner/Tiny", "/data/Tiny-f16.gguf", {}, []),
        ("owner/Tiny", "/data/Tiny-Instruct.Q4_1.gguf", {}, ["other-base"]),
        (None, "owner/Tiny", {}, []),
        ("owner/Large", "owner/Tiny", {}, ["other-base"]),
        ("owner/Tiny-bnb-4bit", "owner/Tiny", {}, ["trained-on-quantised-base"]),
        ("owner/Large-bnb-4bit", "owner/Tiny", {}, ["other-base"]),
    ],
)
def test_another_base_than_the_named_one_is_a_finding(
    tmp_path: Path, named: str | None, base: str, config: dict[str, Any], expected: list[str]
) -> None:
    checkpoint = make_checkpoint(tmp_path, {UP: torch.zeros(6, 4)}, LLAMA | config)
    checkpoint = replace(checkpoint, ref=CheckpointRef(name=base))
    adapter = linear_adapter({UP: (6, 4)}, base_hint=BaseHint(name=named))
    assert [finding.code for finding in bind([adapter], checkpoint).findings] == expected


def test_another_revision_is_a_finding(tmp_path: Path) -> None:
    checkpoint = replace(llama(tmp_path), ref=CheckpointRef(name="o/n", revision="abc123"))
    for revision, expected in (("abc", []), ("main", []), ("def", ["other-revision"]), (None, [])):
        adapter = linear_adapter({UP: (6, 4)}, base_hint=BaseHint(name="o/n", revision=revision))
        assert [finding.code for finding in bind([adapter], checkpoint).findings] == expected


def test_what_the_reader_noticed_is_kept(tmp_path: Path) -> None:
    noticed = Finding(code="untrained", severity=Severity.WARN, target="x", message="y")
    assert bind([linear_adapter({UP: (6, 4)}, findings=(noticed,))], llama(tmp_path)).findings == (noticed,)


def test_an_update_of_low_rank_keeps_its_type(tmp_path: Path) -> None:
    assert isinstance(bind([linear_adapter({UP: (6, 4)})], llama(tmp_path)).updates[UP][0].update, LowRank)


# ------------------------------------------------------------------------------------------------------ flattened names


def flattened(*modules: str) -> Adapter:
    updates = [stored(f"{module}.weight", low_rank(4, 4)) for module in modules]
    return replace(adapter_of(*updates), naming=Naming.FLATTENED)


def test_underscores_are_the_dots_of_the_one_module_that_fits(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, {"a_b.c.weight": torch.randn(4, 4), "a.d.weight": torch.randn(4, 4)})
    assert [*bind([flattened("a_b_c", "a_d")], checkpoint).updates] == ["a.d.weight", "a_b.c.weight"]


def test_underscores_that_fit_two_modules_are_ambiguous(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, {"a_b.c.weight": torch.randn(4, 4), "a.b_c.weight": torch.randn(4, 4)})
    (finding,) = misfits([flattened("a_b_c")], checkpoint)
    assert finding.code == "ambiguous-target"
    assert finding.message == "with dots for underscores it fits a.b_c.weight and a_b.c.weight"


def test_underscores_of_no_module_are_missing_with_the_nearest(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, {"down.attn.to_q.weight": torch.randn(4, 4)})
    (finding,) = misfits([flattened("down_attn_to_qq")], checkpoint)
    assert finding.code == "target-missing"
    assert finding.message == "not in base; nearest: down_attn_to_q"


def test_underscores_of_a_module_without_the_tensor_say_which(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, {"down.attn.to_q.weight": torch.randn(4, 4)})
    bias = stored("down_attn_to_q.bias", Addition(values=torch.ones(4), scale=make_scale(1)))
    (finding,) = misfits([replace(adapter_of(bias), naming=Naming.FLATTENED)], checkpoint)
    assert (finding.code, finding.target) == ("bias-missing", "down.attn.to_q.bias")
