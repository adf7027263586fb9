"""The plan names every output byte once, and says what becomes of dtype and configuration."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_deploy.errors import MergeError, RecipeError
from lora_deploy.merge.options import MergeOptions
from lora_deploy.merge.plan import MergePlan, Treatment, plan_merge
from lora_deploy.safetensors_file import read_header
from lora_deploy.tensors import DType
from lora_deploy.updates.replacement import Replacement
from tests.builders import low_rank, make_checkpoint
from tests.merging import binding_of

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool]
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


def plan_of(folder: Path, tensors: dict[str, torch.Tensor], updates: Any = None, **options: Any) -> MergePlan:
    config = options.pop("config", {"model_type": "llama"})
    binding = binding_of(make_checkpoint(folder / "base", tensors, config), updates or {})
    return plan_merge(binding, MergeOptions(**options))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(st.tuples(SHAPES, st.sampled_from(DTYPES), st.booleans()), min_size=1, max_size=12),
    max_shard_bytes=st.sampled_from([1, 40, 300, 10**9]),
    dtype=st.sampled_from(["float16", "bfloat16", "float32", "base"]),
)
def test_every_tensor_is_planned_once_and_every_byte_has_one_owner(
    shapes: list[tuple[tuple[int, ...], torch.dtype, bool]], max_shard_bytes: int, dtype: str, tmp_path: Path
) -> None:
    tensors = {f"t{k}.weight": torch.zeros(shape).to(kind) for k, (shape, kind, _) in enumerate(shapes)}
    updates = {
        f"t{k}.weight": low_rank(*shape)
        for k, (shape, kind, adapted) in enumerate(shapes)
        if adapted and len(shape) == 2 and kind.is_floating_point
    }
    plan = plan_of(tmp_path, tensors, updates, dtype=dtype, max_shard_bytes=max_shard_bytes)
    assert [tensor.spec.name for tensor in plan.tensors] == list(plan.binding.outputs)
    assert sorted(plan.binding.outputs) == sorted(tensors)
    for shard in plan.shards:
        end = 0
        for tensor in shard.tensors:
            assert (tensor.spec.file, tensor.spec.start) == (shard.file, end)
            assert tensor.spec.n_bytes == math.prod(tensor.spec.shape) * tensor.spec.dtype.n_bytes
            end = tensor.spec.stop
        assert end <= max_shard_bytes or sum(tensor.spec.n_bytes > 0 for tensor in shard.tensors) <= 1
        written = tmp_path / "written"
        written.write_bytes(shard.header + bytes(end))
        assert written.stat().st_size == shard.n_bytes
        assert read_header(written, file=shard.file).tensors == {t.spec.name: t.spec for t in shard.tensors}
    for tensor in plan.tensors:
        own = DType.from_long_name(str(tensors[tensor.spec.name].dtype))
        is_cast = own.is_floating and dtype != "base"
        assert tensor.spec.dtype is (DType.from_long_name(dtype) if is_cast else own)
        if tensor.spec.name in updates:
            assert tensor.treatment is Treatment.MERGED
        else:
            assert tensor.treatment is (Treatment.UNTOUCHED if tensor.spec.dtype is own else Treatment.CAST)


def test_one_shard_has_the_plain_name_and_several_are_numbered(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(10), "b": torch.zeros(10), "c": torch.zeros(10)}
    assert [shard.file for shard in plan_of(tmp_path, tensors).shards] == ["model.safetensors"]
    several = plan_of(tmp_path, tensors, max_shard_bytes=40)
    assert [shard.file for shard in several.shards] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


def test_a_shard_may_be_exactly_as_large_as_allowed(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, {"a": torch.zeros(10), "b": torch.zeros(10)}, dtype="base", max_shard_bytes=80)
    assert len(plan.shards) == 1


@pytest.mark.parametrize(("option", "value"), [("dtype", "float8"), ("dtype", "Float16"), ("max_shard_bytes", 0)])
def test_an_option_that_cannot_be_obeyed_is_refused(tmp_path: Path, option: str, value: Any) -> None:
    with pytest.raises(RecipeError, match=str(value)):
        plan_of(tmp_path, {"a": torch.zeros(1)}, **{option: value})


def test_a_tensor_that_nobody_has_the_values_of_is_refused(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "base", {"a": torch.zeros(2, 2)})
    binding = binding_of(checkpoint, {}, outputs={"a": "a", "b": None})
    with pytest.raises(MergeError, match="b: neither base nor adapter has its values"):
        plan_merge(binding, MergeOptions())


def test_an_added_tensor_takes_the_dtype_that_most_of_the_base_has(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(9, dtype=torch.bfloat16), "b": torch.zeros(2), "n": torch.zeros(99, dtype=torch.int64)}
    added = {"score.weight": Replacement(values=torch.ones(2, 3))}
    checkpoint = make_checkpoint(tmp_path / "base", tensors)
    binding = binding_of(checkpoint, added, shapes={"score.weight": (2, 3)})
    for option, expected in (("base", DType.BF16), ("float16", DType.F16)):
        planned = {t.spec.name: t for t in plan_merge(binding, MergeOptions(dtype=option)).tensors}["score.weight"]
        assert (planned.spec.dtype, planned.treatment) == (expected, Treatment.ADDED)


@pytest.mark.parametrize(
    ("config", "edited"),
    [
        ({"dtype": "bfloat16"}, {"dtype": "float16"}),
        ({"torch_dtype": "bfloat16"}, {"torch_dtype": "float16"}),
        ({"hidden_size": 8}, {"hidden_size": 8, "torch_dtype": "float16"}),
        (
            {"torch_dtype": "float32", "text_config": {"dtype": "bfloat16", "n": 1}, "vision_config": {"n": 2}},
            {"torch_dtype": "float16", "text_config": {"dtype": "float16", "n": 1}, "vision_config": {"n": 2}},
        ),
    ],
)
def test_the_configuration_says_the_dtype_that_is_really_there(
    tmp_path: Path, config: dict[str, Any], edited: dict[str, Any]
) -> None:
    tensors = {"a": torch.zeros(2)}
    plan = plan_of(tmp_path, tensors, config=config)
    assert plan.config == edited
    assert plan_of(tmp_path, tensors, config=config, dtype="base").config == config
    assert json.loads((tmp_path / "base" / "config.json").read_text()) == plan.binding.checkpoint.config == config


def test_edits_of_the_binding_reach_nested_keys_and_not_the_base(tmp_path: Path) -> None:
    config = {"text_config": {"vocab_size": 8}, "list": [{"a": 1}]}
    checkpoint = make_checkpoint(tmp_path / "base", {"a": torch.zeros(2)}, config)
    edits = {"text_config.vocab_size": 9, "tie_word_embeddings": False, "new.key": 1}
    plan = plan_merge(binding_of(checkpoint, {}, config_edits=edits), MergeOptions(dtype="base"))
    assert plan.config == config | {"text_config": {"vocab_size": 9}, "tie_word_embeddings": False, "new": {"key": 1}}
    assert checkpoint.config == config


def test_a_base_without_a_configuration_gets_none(tmp_path: Path) -> None:
    binding = binding_of(make_checkpoint(tmp_path / "base", {"a": torch.zeros(2)}), {})
    assert plan_merge(binding, MergeOptions()).config == {}


@pytest.mark.parametrize("model_type", ["t5", "gemma3"])
def test_a_model_type_whose_activations_overflow_float16_is_warned_about(tmp_path: Path, model_type: str) -> None:
    config = {"model_type": "composite", "text_config": {"model_type": model_type}}
    tensors = {"a": torch.zeros(2)}
    (finding,) = plan_of(tmp_path, tensors, config=config).findings
    assert (finding.code, finding.severity.value) == ("float16-activations", "warn")
    assert model_type in finding.message
    assert not plan_of(tmp_path, tensors, config=config, dtype="bfloat16").findings
    assert not plan_of(tmp_path, tensors, config={"model_type": "llama"}).findings
