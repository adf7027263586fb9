"""PEFT files by hand: tiny tensors whose products can be seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_deploy.adapter import Adapter, Experts, Orientation
from lora_deploy.adapters.interface import ReadOptions
from lora_deploy.adapters.open import read_adapter
from lora_deploy.errors import LoraDeployError, MalformedAdapterError, NonFiniteTensorError, UnmergeableAdapterError
from lora_deploy.updates.dora import Dora
from lora_deploy.updates.low_rank import LowRank
from lora_deploy.updates.replacement import Replacement
from lora_deploy.updates.residual import Residual
from lora_deploy.updates.token_rows import TokenRows
from tests.builders import save_peft

A = torch.tensor([[1.0, 2.0, 3.0]])
"""(1, 3)"""
B = torch.tensor([[1.0], [10.0]])
"""(2, 1)"""
DELTA = torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]], dtype=torch.float64)
ROOT = "base_model.model."
LINEAR = {f"{ROOT}q.lora_A.weight": A, f"{ROOT}q.lora_B.weight": B}


def read(folder: Path, tensors: dict[str, Tensor], options: ReadOptions | None = None, **config: Any) -> Adapter:
    """Save with r 1 and alpha 1 unless told otherwise, and read."""
    apart = {key: tensor.clone() for key, tensor in tensors.items()}
    return read_adapter(save_peft(folder, apart, {"r": 1, "lora_alpha": 1, **config}), options or ReadOptions())


def codes(adapter: Adapter) -> set[str]:
    return {finding.code for finding in adapter.findings}


def delta_of(adapter: Adapter, target: str) -> Tensor:
    update = next(found.update for found in adapter.updates if found.target == target)
    assert isinstance(update, LowRank)
    return update.delta()


# ------------------------------------------------------------------------------------------------------ plain updates


def test_a_linear_layer_is_laid_out_as_it_computes(tmp_path: Path) -> None:
    adapter = read(tmp_path, LINEAR, lora_alpha=3, base_model_name_or_path="owner/base", revision="v1")
    (found,) = adapter.updates
    assert found.target == "q.weight"
    assert found.orientation is Orientation.UNKNOWN
    assert found.keys == (f"{ROOT}q.lora_A.weight", f"{ROOT}q.lora_B.weight")
    assert torch.equal(delta_of(adapter, "q.weight"), 3 * DELTA)
    assert (adapter.base_hint.name, adapter.base_hint.revision) == ("owner/base", "v1")
    assert adapter.config["lora_alpha"] == 3
    assert adapter.findings == ()


@pytest.mark.parametrize("name", [None, "", "  "])
def test_an_empty_base_name_is_none(tmp_path: Path, name: str | None) -> None:
    assert read(tmp_path, LINEAR, base_model_name_or_path=name).base_hint.name is None


def test_an_embedding_is_stored_as_vocabulary_by_dimension(tmp_path: Path) -> None:
    adapter = read(tmp_path, {f"{ROOT}emb.lora_embedding_A": A, f"{ROOT}emb.lora_embedding_B": B})
    assert adapter.updates[0].orientation is Orientation.STORED
    assert torch.equal(delta_of(adapter, "emb.weight"), DELTA.T)


def test_a_convolution_is_flattened_behind_its_input_axis(tmp_path: Path) -> None:
    down = torch.arange(1.0, 7.0).reshape(1, 3, 2)
    adapter = read(tmp_path, {f"{ROOT}c.lora_A.weight": down, f"{ROOT}c.lora_B.weight": B.reshape(2, 1, 1)})
    assert adapter.updates[0].orientation is Orientation.STORED
    assert delta_of(adapter, "c.weight").tolist() == [[1, 2, 3, 4, 5, 6], [10, 20, 30, 40, 50, 60]]


def test_a_grouped_convolution_is_refused_with_its_reason(tmp_path: Path) -> None:
    tensors = {f"{ROOT}c.lora_A.weight": torch.ones(4, 6, 3, 3), f"{ROOT}c.lora_B.weight": torch.ones(8, 2, 1, 1)}
    with pytest.raises(UnmergeableAdapterError, match="grouped convolution is dense across groups"):
        read(tmp_path, tensors, r=4)


def test_the_module_of_old_peft_with_three_parts_is_padded_with_zeros(tmp_path: Path) -> None:
    """As peft <= 0.2 wrote it, enable_lora [true, false, true]: B is a grouped 1-D convolution of two groups."""
    down = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    up = torch.tensor([[1.0], [10.0], [100.0], [1000.0]]).reshape(4, 1, 1)
    tensors = {f"{ROOT}qkv.lora_A.weight": down, f"{ROOT}qkv.lora_B.weight": up}
    adapter = read(tmp_path, tensors, enable_lora=[True, False, True], merge_weights=False, fan_in_fan_out=True)
    expected = [[1, 2], [10, 20], [0, 0], [0, 0], [300, 400], [3000, 4000]]
    assert delta_of(adapter, "qkv.weight").tolist() == expected


def test_output_projections_of_attention_count_twice_until_peft_0_21_2(tmp_path: Path) -> None:
    tensors = {
        f"{ROOT}mha.lora_A.weight": torch.ones(1, 2),
        f"{ROOT}mha.lora_B.weight": torch.ones(6, 1),
        f"{ROOT}mha.base_layer.out_proj.lora_A.weight": torch.ones(1, 2),
        f"{ROOT}mha.base_layer.out_proj.lora_B.weight": torch.ones(2, 1),
    }
    for version, factor in ((None, 2), ("0.21.2", 2), ("0.22.0", 1)):
        adapter = read(tmp_path, tensors, peft_version=version, lora_alpha=3)
        assert {found.target for found in adapter.updates} == {"mha.in_proj_weight", "mha.out_proj.weight"}
        assert delta_of(adapter, "mha.in_proj_weight")[0, 0] == 3
        assert delta_of(adapter, "mha.out_proj.weight")[0, 0] == 3 * factor
        assert ("newer-peft" in codes(adapter)) is (version == "0.22.0")
    sources = [found.update.scale.source for found in read(tmp_path, tensors).updates]
    assert sorted(source.startswith("2 × ") for source in sources) == [False, True]


def test_experts_keep_their_nesting_and_every_parameter_they_may_mean(tmp_path: Path) -> None:
    tensors = {
        f"{ROOT}mlp.experts.base_layer.lora_A.weight": torch.arange(12.0).reshape(4, 3),
        f"{ROOT}mlp.experts.base_layer.lora_B.weight": torch.arange(8.0).reshape(2, 4),
        f"{ROOT}mlp.experts.lora_A.weight": torch.ones(2, 2),
        f"{ROOT}mlp.experts.lora_B.weight": torch.ones(3, 2),
    }
    config = {"target_parameters": ["experts.up", "experts.down"], "rank_pattern": {"up": 2}, "lora_alpha": 6}
    adapter = read(tmp_path, tensors, **config)
    inner, outer = (found.update for found in adapter.updates)
    assert isinstance(inner, Experts)
    assert isinstance(outer, Experts)
    assert {found.target for found in adapter.updates} == {"mlp.experts"}
    assert (inner.nesting, outer.nesting) == (1, 0)
    assert inner.ranks == {"up": 2, "down": 1}
    assert (inner.n_experts("up"), outer.n_experts("down")) == (2, 2)
    # Expert 1 of two: rows 2 and 3 of A (expert-major), columns 1 and 3 of B (rank-major); scale 6 / 2.
    down, up = torch.arange(6.0, 12.0).reshape(2, 3), torch.tensor([[1.0, 3.0], [5.0, 7.0]])
    assert torch.equal(inner.expert("up", 1).delta(), (3 * up @ down).double())


def test_nested_adapters_without_target_parameters_are_malformed(tmp_path: Path) -> None:
    tensors = {f"{ROOT}x.base_layer.lora_A.weight": A, f"{ROOT}x.base_layer.lora_B.weight": B}
    with pytest.raises(MalformedAdapterError, match="1 nested adapters, target_parameters names 0"):
        read(tmp_path, tensors)


def test_block_diagonal_factors_are_expanded(tmp_path: Path) -> None:
    tensors = {
        f"{ROOT}up.lora_A.weight": torch.tensor([[1.0], [2.0]]),
        f"{ROOT}up.lora_B.weight": torch.tensor([[1.0, 10.0]]),
        f"{ROOT}down.lora_A.weight": torch.tensor([[1.0], [10.0]]),
        f"{ROOT}down.lora_B.weight": torch.tensor([[3.0], [4.0]]),
    }
    blocks = {"target_modules_bd_a": ["up"], "target_modules_bd_b": ["down"], "nblocks": 2}
    adapter = read(tmp_path, tensors, r=2, lora_alpha=2, use_bdlora=blocks)
    assert delta_of(adapter, "up.weight").tolist() == [[1, 20]]
    assert delta_of(adapter, "down.weight").tolist() == [[3], [40]]
    with pytest.raises(MalformedAdapterError, match="matches none of target_modules_bd_a"):
        read(tmp_path, tensors, r=2, use_bdlora={**blocks, "target_modules_bd_b": []})


# --------------------------------------------------------------------------------------------------------- other kinds


def test_residual_initialisations_are_undone_unless_the_base_is_the_residual(tmp_path: Path) -> None:
    for init in ("pissa", "olora"):
        (found,) = read(tmp_path, LINEAR, init_lora_weights=init).updates
        assert isinstance(found.update, Residual)
        assert found.update.method == init
        (found,) = read(tmp_path, LINEAR, ReadOptions(base_is_residual=True), init_lora_weights=init).updates
        assert isinstance(found.update, LowRank)


def test_loftq_and_its_like_are_plain_on_the_base_that_training_wrote(tmp_path: Path) -> None:
    with pytest.raises(UnmergeableAdapterError, match="loftq"):
        read(tmp_path, LINEAR, init_lora_weights="loftq", loftq_config={"loftq_bits": 4})
    adapter = read(tmp_path, LINEAR, ReadOptions(base_is_residual=True), init_lora_weights="loftq")
    assert isinstance(adapter.updates[0].update, LowRank)


def test_a_converted_pissa_adapter_is_plain(tmp_path: Path) -> None:
    """Converted on saving: rank and alpha doubled, initialisation true."""
    tensors = {f"{ROOT}q.lora_A.weight": A.repeat(2, 1), f"{ROOT}q.lora_B.weight": torch.cat([2 * B, -B], dim=1)}
    adapter = read(tmp_path, tensors, r=2, lora_alpha=2, init_lora_weights=True)
    assert torch.equal(delta_of(adapter, "q.weight"), DELTA)


@pytest.mark.parametrize("suffix", ["lora_magnitude_vector", "lora_magnitude_vector.weight"])
def test_a_magnitude_makes_dora(tmp_path: Path, suffix: str) -> None:
    magnitude = torch.tensor([3.0, 4.0])
    (found,) = read(tmp_path, {**LINEAR, f"{ROOT}q.{suffix}": magnitude}, use_dora=True).updates
    assert isinstance(found.update, Dora)
    assert found.update.axis == "rows"
    assert found.update.magnitude.tolist() == [3, 4]
    assert len(found.keys) == 3


@pytest.mark.parametrize(
    ("tensors", "config", "problem"),
    [
        (
            {"q.lora_magnitude_vector": torch.ones(2)},
            {"use_dora": False},
            "a magnitude in the file, but use_dora is false",
        ),
        ({}, {"use_dora": True}, "no magnitude in the file, but use_dora is true"),
        ({"q.lora_magnitude_vector": torch.ones(3)}, {"use_dora": True}, "magnitude has 3 values, expected 2"),
        ({"q.lora_B.bias": torch.ones(2)}, {}, "a lora_B.bias in the file, but lora_bias is false"),
        ({}, {"lora_bias": True}, "no lora_B.bias in the file, but lora_bias is true"),
        ({"q.lora_B.bias": torch.ones(3)}, {"lora_bias": True}, "lora_B.bias has 3 values, expected 2"),
        ({"q.lora_diag": torch.ones(1)}, {}, "a lora_diag in the file, but kasa_config is unset"),
        ({}, {"kasa_config": {"beta": 0.0}}, "no lora_diag in the file, but kasa_config is set"),
        ({"q.lora_diag": torch.ones(2)}, {"kasa_config": {}}, "lora_diag has 2 values, expected 1"),
        ({"k.lora_A.weight": A}, {}, "k: has lora_A but no lora_B"),
        ({"k.lora_B.weight": B}, {}, "k: has lora_B but no lora_A"),
        ({"k.lora_embedding_A": A}, {}, "k: has lora_embedding_A but no lora_embedding_B"),
        ({"q.lora_A.bias": torch.ones(1)}, {}, r"q\.lora_A\.bias is no part of this kind of module"),
        ({"k.lora_A.weight": A, "k.lora_B.weight": torch.ones(2, 2)}, {}, "the ranks differ"),
        ({"k.lora_A.weight": A, "k.lora_B.weight": torch.ones(2)}, {}, "expected 2 or 3 or 4 or 5 axes"),
        ({"k.lora_A.weight": torch.ones(1, 3, 3), "k.lora_B.weight": torch.ones(2, 1, 3)}, {}, r"\(out, r, \*1\)"),
        ({"k.lora_A.weight": torch.empty(0), "k.lora_B.weight": B}, {}, "is empty.*ZeRO-3"),
        ({"k.lora_A.weight": A.to(torch.int8), "k.lora_B.weight": B}, {}, "found int8, expected dense float64"),
        ({"t.token_adapter.trainable_tokens_delta": torch.ones(2, 3)}, {}, "names no token of t"),
        (
            {"t.token_adapter.trainable_tokens_delta": torch.ones(2, 3)},
            {"trainable_token_indices": [1]},
            "2 rows for 1 distinct token ids",
        ),
        (
            {"t.token_adapter.trainable_tokens_delta": torch.ones(2, 3)},
            {"trainable_token_indices": [1, 1]},
            "2 rows for 1 distinct token ids",
        ),
        ({"score.weight": torch.empty(0, 3)}, {}, "score.weight: is empty"),
    ],
    ids=str,
)
def test_what_breaks_the_rules_is_named(
    tmp_path: Path, tensors: dict[str, Tensor], config: dict[str, Any], problem: str
) -> None:
    named = {f"{ROOT}{key}": tensor for key, tensor in tensors.items()}
    with pytest.raises(MalformedAdapterError, match=problem):
        read(tmp_path, {**LINEAR, **named}, **config)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("key", ["k.lora_A.weight", "score.weight"])
def test_a_value_that_is_no_number_is_named(tmp_path: Path, value: float, key: str) -> None:
    bad = torch.tensor([[1.0, value, 3.0]], dtype=torch.bfloat16)
    tensors = {**LINEAR, f"{ROOT}k.lora_A.weight": A, f"{ROOT}k.lora_B.weight": B, f"{ROOT}{key}": bad}
    with pytest.raises(NonFiniteTensorError, match=f"{key}: 1 of 3 values"):
        read(tmp_path, tensors)


# ------------------------------------------------------------------------------------------------------- whole tensors


def test_heads_replace_and_come_before_the_changes(tmp_path: Path) -> None:
    head = torch.tensor([[7.0, 8.0, 9.0]])
    tensors = {**LINEAR, f"{ROOT}score.weight": head, f"{ROOT}q.bias": torch.ones(2)}
    adapter = read(tmp_path, tensors)
    kinds = [type(found.update) for found in adapter.updates]
    assert kinds == [Replacement, Replacement, LowRank]
    assert codes(adapter) == {"saved-unlisted"}
    assert codes(read(tmp_path, tensors, modules_to_save=["score"], bias="all")) == set()


def test_copies_of_the_base_are_no_updates(tmp_path: Path) -> None:
    tensors = {
        f"{ROOT}emb.lora_embedding_A": A,
        f"{ROOT}emb.lora_embedding_B": B,
        f"{ROOT}emb.base_layer.weight": torch.zeros(3, 2),
    }
    adapter = read(tmp_path, tensors)
    assert [found.target for found in adapter.updates] == ["emb.weight"]
    assert adapter.base_names == {"emb.weight"}
    assert adapter.base_copies[0].keys == (f"{ROOT}emb.base_layer.weight",)
    assert codes(adapter) == {"base-copies"}


def test_a_raw_state_dict_of_a_whole_model_is_read(tmp_path: Path) -> None:
    tensors = {
        f"{ROOT}q.base_layer.weight": torch.zeros(2, 3),
        f"{ROOT}q.base_layer.bias": torch.ones(2),
        f"{ROOT}q.lora_A.default.weight": A,
        f"{ROOT}q.lora_B.default.weight": B,
        f"{ROOT}norm.weight": torch.ones(3),
        f"{ROOT}rotary_emb.inv_freq": torch.ones(1),
        f"{ROOT}head.original_module.weight": torch.zeros(1, 3),
        f"{ROOT}head.modules_to_save.default.weight": torch.ones(1, 3),
    }
    torch.save(tensors, tmp_path / "model.pt")
    adapter = read_adapter(tmp_path / "model.pt", ReadOptions(alpha=1))
    assert {found.target for found in adapter.updates} == {"q.bias", "norm.weight", "head.weight", "q.weight"}
    assert adapter.base_names == {"q.weight"}
    assert torch.equal(delta_of(adapter, "q.weight"), DELTA)
    assert "unused-tensors" in codes(adapter)


def test_token_rows_take_the_indices_of_their_embedding(tmp_path: Path) -> None:
    key = f"{ROOT}model.tok.token_adapter.trainable_tokens_delta"
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    for indices in ([5, 2], {"tok": [5, 2], "other": [0]}):
        adapter = read(tmp_path, {**LINEAR, key: rows}, trainable_token_indices=indices)
        found = adapter.updates[-1]
        assert isinstance(found.update, TokenRows)
        assert (found.target, found.update.indices, found.keys) == ("model.tok.weight", (5, 2), (key,))
        assert torch.equal(found.update.values, rows)


def test_every_tensor_is_in_one_update_or_counted_by_a_finding(tmp_path: Path) -> None:
    ignored = f"{ROOT}q.lora_velora_embed"
    adapter = read(
        tmp_path, {**LINEAR, ignored: torch.ones(1), f"{ROOT}score.weight": A}, velora_config={"num_groups": 2}
    )
    used = [key for found in adapter.updates for key in found.keys]
    assert sorted(used) == sorted([*LINEAR, f"{ROOT}score.weight"])
    note = next(finding for finding in adapter.findings if finding.code == "unused-tensors")
    assert note.target == ignored
    assert note.message == "1 tensors are left out: used in training only (VeLoRA, MonteCLoRA)"


def test_a_file_of_whole_tensors_only_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(MalformedAdapterError, match=r"none of its 1 tensors is LoRA's, first lin\.weight"):
        read(tmp_path, {"lin.weight": A})


# ----------------------------------------------------------------------------------------------------------- surprises


@pytest.mark.parametrize(
    ("tensors", "config", "code"),
    [
        ({}, {"bias": "lora_only"}, "bias-lost"),
        ({}, {"modules_to_save": ["score", "extra"]}, "saved-module-absent"),
        ({}, {"rank_pattern": {"typo": 3}}, "pattern-unmatched"),
        ({}, {"megatron_config": {"tensor_model_parallel_size": 2}}, "tensor-parallel"),
        ({}, {"peft_version": "0.30.0"}, "newer-peft"),
        ({"k.lora_A.weight": A, "k.lora_B.weight": 0 * B}, {}, "untrained"),
        ({"e.lora_embedding_A": A, "e.lora_embedding_B": B}, {"ensure_weight_tying": True}, "tying-unclear"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_surprise_is_a_finding(tmp_path: Path, tensors: dict[str, Tensor], config: dict[str, Any], code: str) -> None:
    named = {f"{ROOT}{key}": tensor for key, tensor in tensors.items()}
    assert code in codes(read(tmp_path, {**LINEAR, **named}, **config))
    assert code not in codes(read(tmp_path, LINEAR))


def test_of_the_heads_that_peft_lists_by_itself_one_is_enough(tmp_path: Path) -> None:
    tensors = {**LINEAR, f"{ROOT}classifier.weight": A}
    assert codes(read(tmp_path, tensors, modules_to_save=["classifier", "score"])) == set()
    absent = read(tmp_path, LINEAR, modules_to_save=["classifier", "score"])
    assert "saved-module-absent" in codes(absent)


def test_a_configuration_without_a_type_or_alpha_is_read_with_a_finding(tmp_path: Path) -> None:
    folder = save_peft(tmp_path, LINEAR, {})
    (folder / "adapter_config.json").write_text('{"r": 1, "lora_alpha": 4}')
    adapter = read_adapter(folder, ReadOptions())
    assert codes(adapter) == {"type-missing"}
    (folder / "adapter_config.json").write_text('{"r": 1, "peft_type": "LORA"}')
    adapter = read_adapter(folder, ReadOptions())
    assert codes(adapter) == {"alpha-default"}
    assert torch.equal(delta_of(adapter, "q.weight"), 8 * DELTA)


def test_alpha_of_the_user_wins_with_a_finding(tmp_path: Path) -> None:
    adapter = read(tmp_path, LINEAR, ReadOptions(alpha=5), lora_alpha=2)
    assert torch.equal(delta_of(adapter, "q.weight"), 5 * DELTA)
    assert codes(adapter) == {"alpha-overridden"}


def test_layer_replication_is_kept_for_the_base_to_resolve(tmp_path: Path) -> None:
    adapter = read(tmp_path, LINEAR, layer_replication=[[0, 2], [1, 3]])
    assert adapter.layer_replication == ((0, 2), (1, 3))


# ---------------------------------------------------------------------------------------------- files without a config


def lone(folder: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file(tensors, folder / "adapter.safetensors", metadata)
    return folder / "adapter.safetensors"


def test_a_lone_file_without_alpha_shows_the_choices(tmp_path: Path) -> None:
    path = lone(tmp_path, {"q.lora_A.weight": A.repeat(4, 1), "q.lora_B.weight": B.repeat(1, 4)})
    with pytest.raises(MalformedAdapterError, match="the scale alpha / r is unknown, r is 4") as caught:
        read_adapter(path, ReadOptions())
    assert caught.value.code == "alpha-unknown"
    assert "--alpha 4 is scale 1, --alpha 8 is scale 2" in str(caught.value.hint)
    adapter = read_adapter(path, ReadOptions(alpha=2))
    assert torch.equal(delta_of(adapter, "q.weight"), 2 * DELTA)
    assert codes(adapter) == {"no-configuration"}
    assert adapter.config_sha256 is None


@pytest.mark.parametrize("name", ["lora_alpha", "alpha"])
def test_alpha_of_a_lone_file_may_be_in_its_header(tmp_path: Path, name: str) -> None:
    adapter = read_adapter(lone(tmp_path, LINEAR, {name: "2.5"}), ReadOptions())
    assert torch.equal(delta_of(adapter, "q.weight"), 2.5 * DELTA)
    update: Any = adapter.updates[0].update
    assert update.scale.source == f"lora_alpha 2.5 / r 1 (metadata {name})"
    overridden = read_adapter(lone(tmp_path, LINEAR, {name: "2.5"}), ReadOptions(alpha=1))
    assert "alpha-overridden" in codes(overridden)


@pytest.mark.parametrize("text", ["many", "nan", "inf", ""])
def test_a_header_alpha_that_is_no_number_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(MalformedAdapterError, match=f"metadata alpha: found '{text}', expected a number"):
        read_adapter(lone(tmp_path, LINEAR, {"alpha": text}), ReadOptions())


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_a_whole_configuration_in_the_header_is_the_configuration(tmp_path: Path, prefix: str) -> None:
    config = {f"{prefix}{key}": value for key, value in {"r": 1, "lora_alpha": 9, "use_rslora": True}.items()}
    path = lone(tmp_path, LINEAR, {"lora_adapter_metadata": json.dumps(config)})
    adapter = read_adapter(path, ReadOptions())
    assert torch.equal(delta_of(adapter, "q.weight"), 9 * DELTA)
    update: Any = adapter.updates[0].update
    assert "rank-stabilised (metadata lora_adapter_metadata)" in update.scale.source


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1, "b.c": 2}'])
def test_a_configuration_in_the_header_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(LoraDeployError, match=r"metadata lora_adapter_metadata|not a PEFT configuration"):
        read_adapter(lone(tmp_path, LINEAR, {"lora_adapter_metadata": text}), ReadOptions())


def test_dora_of_a_lone_file_is_seen_by_its_magnitudes(tmp_path: Path) -> None:
    path = lone(tmp_path, {**LINEAR, f"{ROOT}q.lora_magnitude_vector": torch.ones(2)})
    assert isinstance(read_adapter(path, ReadOptions(alpha=1)).updates[0].update, Dora)
