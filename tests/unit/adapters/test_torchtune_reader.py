"""Adapters of torchtune: names, alpha, the order of rows, and which of two files in a folder is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_deploy.adapter import RowOrder
from lora_deploy.adapters.interface import ReadOptions
from lora_deploy.adapters.open import read_adapter
from lora_deploy.errors import MalformedAdapterError
from lora_deploy.updates.dora import Dora
from lora_deploy.updates.low_rank import LowRank
from lora_deploy.validate import bind
from tests.builders import make_checkpoint, merged_values

CONFIG = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj"], "peft_type": "LORA"}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
HALVES = [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
"""Paired rows of two heads of six in the order of halves; no permutation that undoes itself."""
NAMES = {
    "layers.3.attn.q_proj": "model.layers.3.self_attn.q_proj",
    "layers.3.attn.k_proj": "model.layers.3.self_attn.k_proj",
    "layers.3.attn.v_proj": "model.layers.3.self_attn.v_proj",
    "layers.3.attn.output_proj": "model.layers.3.self_attn.o_proj",
    "layers.3.mlp.w1": "model.layers.3.mlp.gate_proj",
    "layers.3.mlp.w2": "model.layers.3.mlp.down_proj",
    "layers.3.mlp.w3": "model.layers.3.mlp.up_proj",
    "output": "lm_head",
    "tok_embeddings": "model.embed_tokens",
}


def pair(module: str, out: int = 12, n_in: int = 3, rank: int = 2) -> dict[str, Tensor]:
    return {f"{module}.lora_a.weight": torch.randn(rank, n_in), f"{module}.lora_b.weight": torch.randn(out, rank)}


def write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None = CONFIG) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(tensors, folder / "adapter_model.pt")
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_every_layer_gets_its_name_in_transformers_and_alpha_over_r(tmp_path: Path) -> None:
    tensors = {key: tensor for module in NAMES for key, tensor in pair(module).items()}
    adapter = read_adapter(write(tmp_path / "epoch_0", tensors))
    assert (adapter.format, adapter.name) == ("torchtune", "epoch_0")
    assert [update.target for update in adapter.updates] == [f"{name}.weight" for name in NAMES.values()]
    orders = {update.target.split(".")[-2]: update.row_order for update in adapter.updates}
    assert {name for name, order in orders.items() if order is RowOrder.TORCHTUNE} == {"q_proj", "k_proj"}
    assert {update.update.scale.value for update in adapter.updates if isinstance(update.update, LowRank)} == {3.0}


@pytest.mark.parametrize(("model_type", "is_paired"), [("llama", True), ("qwen2", False)])
def test_pairs_become_halves_where_the_family_was_trained_in_pairs(
    tmp_path: Path, model_type: str, is_paired: bool
) -> None:
    tensors = pair("layers.0.attn.q_proj")
    name = "model.layers.0.self_attn.q_proj.weight"
    base = make_checkpoint(tmp_path / "base", {name: torch.zeros(12, 3)}, {"model_type": model_type, **HEADS})
    found = merged_values(bind([read_adapter(write(tmp_path / "a", tensors))], base))[name].numpy()
    a, b = (tensor.double().numpy() for tensor in tensors.values())
    np.testing.assert_allclose(found, 3 * (b @ a)[HALVES] if is_paired else 3 * (b @ a))


def test_magnitudes_move_with_their_rows(tmp_path: Path) -> None:
    magnitude = torch.arange(12.0) + 1
    tensors = pair("layers.0.attn.q_proj") | {"layers.0.attn.q_proj.magnitude": magnitude}
    name = "model.layers.0.self_attn.q_proj.weight"
    base = make_checkpoint(tmp_path / "base", {name: torch.randn(12, 3)}, {"model_type": "llama", **HEADS})
    (update,) = bind([read_adapter(write(tmp_path / "a", tensors))], base).updates[name]
    assert isinstance(update.update, Dora)
    assert update.update.magnitude.tolist() == [1 + row for row in HALVES]


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_an_export_with_magnitudes_is_put_right(tmp_path: Path, model_type: str) -> None:
    """What the exporter writes: B in halves for every family, magnitudes as they were."""
    own = pair("layers.0.attn.q_proj") | {"layers.0.attn.q_proj.magnitude": torch.arange(12.0) + 1}
    peft = "base_model.model.model.layers.0.self_attn.q_proj"
    exported = {
        f"{peft}.lora_A.weight": own["layers.0.attn.q_proj.lora_a.weight"],
        f"{peft}.lora_B.weight": own["layers.0.attn.q_proj.lora_b.weight"][HALVES].contiguous(),
        f"{peft}.lora_magnitude_vector": own["layers.0.attn.q_proj.magnitude"],
    }
    (tmp_path / "b").mkdir()
    save_file(exported, tmp_path / "b" / "adapter_model.safetensors")
    (tmp_path / "b" / "adapter_config.json").write_text(json.dumps(CONFIG))
    name = "model.layers.0.self_attn.q_proj.weight"
    base = make_checkpoint(tmp_path / "base", {name: torch.randn(12, 3)}, {"model_type": model_type, **HEADS})
    adapters = [read_adapter(write(tmp_path / "a", own)), read_adapter(tmp_path / "b")]
    assert [adapter.format for adapter in adapters] == ["torchtune", "torchtune"]
    expected, found = (merged_values(bind([adapter], base))[name] for adapter in adapters)
    assert torch.equal(expected, found)


def test_torchtunes_own_file_is_read_where_its_export_lies_beside_it(tmp_path: Path) -> None:
    folder = write(tmp_path, pair("layers.0.attn.v_proj"))
    save_file(pair("anything"), folder / "adapter_model.safetensors")
    assert read_adapter(folder).path.name == "adapter_model.pt"


BROKEN: dict[str, tuple[dict[str, Tensor], dict[str, Any] | None, str]] = {
    "one factor": ({"output.lora_a.weight": torch.ones(2, 3)}, CONFIG, "found lora_a, expected lora_a, lora_b"),
    "half of it dora": (
        pair("output") | pair("layers.0.mlp.w1") | {"output.magnitude": torch.ones(12)},
        CONFIG,
        "found lora_a, lora_b, expected lora_a, lora_b, magnitude",
    ),
    "another rank": (pair("output", rank=3), CONFIG, "have rank 3, adapter_config.json says 2"),
    "no alpha": (pair("output"), None, "the scale alpha / r is unknown"),
    "a vision model": (pair("decoder.layers.0.layer.attn.q_proj"), CONFIG, "is no layer of torchtune's plain"),
    "a foreign tensor": (
        pair("output") | {"norm.scale": torch.ones(2)},
        CONFIG,
        "neither lora_a, lora_b nor magnitude",
    ),
    "too few magnitudes": (pair("output") | {"output.magnitude": torch.ones(3)}, CONFIG, "3 magnitudes for 12 rows"),
}


@pytest.mark.parametrize("case", BROKEN.values(), ids=BROKEN)
def test_what_breaks_the_rules_is_refused(
    tmp_path: Path, case: tuple[dict[str, Tensor], dict[str, Any] | None, str]
) -> None:
    tensors, config, told = case
    with pytest.raises(MalformedAdapterError, match=told):
        read_adapter(write(tmp_path, tensors, config))


def test_without_a_configuration_the_users_alpha_counts(tmp_path: Path) -> None:
    adapter = read_adapter(write(tmp_path, pair("output"), None), ReadOptions(alpha=4))
    update = adapter.updates[0].update
    assert isinstance(update, LowRank)
    assert update.scale.value == 2
