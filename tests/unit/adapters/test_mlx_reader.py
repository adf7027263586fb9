"""Adapters of mlx-lm: layouts, the absolute scale, and what is refused; numbers visible, numpy as the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_deploy.adapter import Adapter, Orientation
from lora_deploy.adapters.interface import ReadOptions
from lora_deploy.adapters.open import read_adapter
from lora_deploy.errors import InputError, MalformedAdapterError, UnmergeableAdapterError, UnsafeFileError
from lora_deploy.updates.dora import Dora
from lora_deploy.updates.low_rank import LowRank
from lora_deploy.updates.replacement import Replacement

A = torch.tensor([[1.0], [2.0], [3.0]])
"""(in, r) = (3, 1)"""
B = torch.tensor([[1.0, 10.0]])
"""(r, out) = (1, 2)"""
DELTA = torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]], dtype=torch.float64)
LINEAR = {"model.layers.0.q_proj.lora_a": A, "model.layers.0.q_proj.lora_b": B}


def write(folder: Path, tensors: dict[str, Tensor], parameters: dict[str, Any] | None = None, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "adapters.safetensors")
    told = {"fine_tune_type": "lora", "lora_parameters": parameters or {"rank": 1, "scale": 4.0}, **config}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    return folder


def low_rank(adapter: Adapter) -> LowRank:
    update = adapter.updates[0].update
    assert isinstance(update, LowRank)
    return update


def test_a_linear_layer_is_read_transposed_with_its_absolute_scale(tmp_path: Path) -> None:
    adapter = read_adapter(write(tmp_path, LINEAR, {"rank": 1, "scale": 4.0, "dropout": 0.0}, model="owner/base"))
    assert (adapter.format, adapter.base_hint.name) == ("mlx", "owner/base")
    assert adapter.updates[0].target == "model.layers.0.q_proj.weight"
    assert adapter.updates[0].orientation is Orientation.UNKNOWN
    assert torch.equal(low_rank(adapter).delta(), 4 * DELTA)
    assert "absolute" in low_rank(adapter).scale.source


def test_an_embeddings_factors_lie_as_its_weight_does(tmp_path: Path) -> None:
    factors = {"model.embed_tokens.lora_a": A, "model.embed_tokens.lora_b": B}
    adapter = read_adapter(write(tmp_path, factors))
    assert adapter.updates[0].orientation is Orientation.STORED
    assert torch.equal(low_rank(adapter).delta(), 4 * DELTA.T)
    assert adapter.shares_ties


@pytest.mark.parametrize("flat", [False, True], ids=["(experts, r, in)", "(experts · r, in), as it was"])
def test_a_stack_of_experts_is_one_update_for_each(tmp_path: Path, flat: bool) -> None:
    down, up = torch.randn(3, 2, 5), torch.randn(3, 4, 2)
    stored = down.reshape(6, 5) if flat else down
    name = "model.layers.0.mlp.switch_mlp.up_proj"
    adapter = read_adapter(write(tmp_path, {f"{name}.lora_a": stored, f"{name}.lora_b": up}, {"rank": 2, "scale": 0.5}))
    assert [update.target for update in adapter.updates] == [
        f"model.layers.0.mlp.experts.{e}.up_proj.weight" for e in range(3)
    ]
    for e, update in enumerate(adapter.updates):
        assert isinstance(update.update, LowRank)
        expected = 0.5 * up[e].double().numpy() @ down[e].double().numpy()
        assert np.array_equal(update.update.delta().numpy(), expected)


def test_dora_has_a_magnitude_for_each_row(tmp_path: Path) -> None:
    tensors = {**LINEAR, "model.layers.0.q_proj.m": torch.tensor([1.0, 2.0])}
    adapter = read_adapter(write(tmp_path, tensors, fine_tune_type="dora"))
    update = adapter.updates[0].update
    assert isinstance(update, Dora)
    assert update.axis == "rows"
    weight = torch.ones(2, 3, dtype=torch.float64)
    moved = weight.numpy() + 4 * DELTA.numpy()
    expected = np.array([[1.0], [2.0]]) * moved / np.linalg.norm(moved, axis=1, keepdims=True)
    np.testing.assert_allclose(update.block(weight, slice(0, 2), update.prepare(lambda rows: weight[rows])), expected)


def test_full_weights_replace(tmp_path: Path) -> None:
    adapter = read_adapter(write(tmp_path, {"model.norm.weight": torch.ones(3)}, fine_tune_type="full"))
    assert isinstance(adapter.updates[0].update, Replacement)


def test_alpha_is_ignored_with_a_warning_and_obeyed_with_the_option(tmp_path: Path) -> None:
    tensors = {"q.lora_a": torch.randn(3, 2), "q.lora_b": torch.randn(2, 4)}
    folder = write(tmp_path, tensors, {"rank": 2, "scale": 10.0, "alpha": 16.0})
    adapter = read_adapter(folder)
    assert [finding.code for finding in adapter.findings] == ["mlx-alpha-ignored"]
    assert low_rank(adapter).scale.value == 10
    legacy = read_adapter(folder, ReadOptions(mlx_legacy_alpha=True))
    assert (legacy.findings, low_rank(legacy).scale.value) == ((), 80)
    told = read_adapter(folder, ReadOptions(alpha=3.0))
    assert low_rank(told).scale.value == 1.5
    assert [finding.code for finding in told.findings] == ["alpha-overridden"]


def test_a_folder_with_checkpoints_of_the_run_is_its_last_state(tmp_path: Path) -> None:
    folder = write(tmp_path, LINEAR)
    save_file({"model.layers.0.q_proj.lora_a": A}, folder / "0000100_adapters.safetensors")
    assert read_adapter(folder).path.name == "adapters.safetensors"


def test_an_npz_without_configuration_asks_for_the_scale(tmp_path: Path) -> None:
    np.savez(tmp_path / "adapters.npz", **{name: tensor.numpy() for name, tensor in LINEAR.items()})
    with pytest.raises(MalformedAdapterError, match="the scale is unknown, r is 1") as caught:
        read_adapter(tmp_path / "adapters.npz")
    assert "--alpha 20 is scale 20" in str(caught.value.hint)
    adapter = read_adapter(tmp_path / "adapters.npz", ReadOptions(alpha=20.0))
    assert torch.equal(low_rank(adapter).delta(), 20 * DELTA)


BROKEN: dict[str, tuple[dict[str, Tensor], dict[str, Any], type[InputError], str]] = {
    "one factor": ({"q.lora_a": A}, {}, MalformedAdapterError, "found lora_a, expected lora_a, lora_b"),
    "magnitude without dora": (
        {**LINEAR, "model.layers.0.q_proj.m": torch.ones(2)},
        {},
        MalformedAdapterError,
        "found lora_a, lora_b, m",
    ),
    "dora without magnitude": (LINEAR, {"fine_tune_type": "dora"}, MalformedAdapterError, "expected lora_a, lora_b, m"),
    "foreign tensor": (LINEAR | {"model.norm.weight": torch.ones(3)}, {}, MalformedAdapterError, "and nothing else"),
    "ranks differ": ({"q.lora_a": A, "q.lora_b": torch.ones(2, 2)}, {}, MalformedAdapterError, "the ranks differ"),
    "another rank than told": (LINEAR, {"lora_parameters": {"rank": 8, "scale": 1}}, MalformedAdapterError, "says 8"),
    "no scale": (LINEAR, {"lora_parameters": {"rank": 1}}, MalformedAdapterError, "the scale is unknown"),
    "a scale that is no number": (LINEAR, {"lora_parameters": {"scale": "4"}}, MalformedAdapterError, "found '4'"),
    "unknown kind": (LINEAR, {"fine_tune_type": "ia3"}, MalformedAdapterError, "expected lora, dora or full"),
    "empty": ({"q.lora_a": torch.empty(0, 1), "q.lora_b": B}, {}, MalformedAdapterError, "is empty"),
    "a stack that is none": (
        {"q.lora_a": torch.ones(2, 1, 3), "q.lora_b": torch.ones(2, 2, 1)},
        {},
        MalformedAdapterError,
        "no stack of experts",
    ),
    "quantised whole weights": (
        {"q.weight": torch.ones(2, 2, dtype=torch.int32)},
        {"fine_tune_type": "full"},
        UnmergeableAdapterError,
        "mlx quantised",
    ),
}


@pytest.mark.parametrize("case", BROKEN.values(), ids=BROKEN)
def test_what_breaks_the_rules_is_refused(
    tmp_path: Path, case: tuple[dict[str, Tensor], dict[str, Any], type[InputError], str]
) -> None:
    tensors, config, error, told = case
    with pytest.raises(error, match=told):
        read_adapter(write(tmp_path, tensors, **config))


def test_the_legacy_option_without_an_alpha_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MalformedAdapterError, match="names no alpha"):
        read_adapter(write(tmp_path, LINEAR), ReadOptions(mlx_legacy_alpha=True))


def test_an_array_of_python_objects_is_never_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **{"q.lora_a": np.array([{"a": 1}], dtype=object)})
    with pytest.raises(UnsafeFileError, match="run a pickle"):
        read_adapter(tmp_path / "a.npz")


def test_a_truncated_npz_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **{name: tensor.numpy() for name, tensor in LINEAR.items()})
    content = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(MalformedAdapterError, match="not a readable npz file"):
        read_adapter(tmp_path / "a.npz")
