"""Adapters of litgpt: the fused projection by its adapted parts, settings from YAML, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from lora_deploy.adapters.interface import ReadOptions
from lora_deploy.adapters.open import read_adapter
from lora_deploy.errors import InputError, MalformedAdapterError, UnmergeableAdapterError
from lora_deploy.updates.low_rank import LowRank

TOLD = {"lora_r": 2, "lora_alpha": 6, "lora_query": True, "lora_key": False, "lora_value": True}
MODEL = {"name": "tiny", "n_head": 4, "n_query_groups": 2, "n_embd": 12, "mlp_class_name": "LLaMAMLP"}
"""Heads of 3 rows: q has 12 rows, k and v 6 each."""
QKV = "transformer.h.5.attn.qkv"


def pair(module: str, out: int = 18, n_in: int = 12, rows: int = 4, rank: int = 2) -> dict[str, Tensor]:
    return {f"{module}.lora_A": torch.randn(rows, n_in), f"{module}.lora_B": torch.randn(out, rank)}


def write(
    folder: Path, tensors: dict[str, Tensor], told: dict[str, Any] | None = TOLD, model: dict[str, Any] | None = MODEL
) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save({"model": tensors}, folder / "lit_model.pth.lora")
    for name, content in (("hyperparameters.yaml", told), ("model_config.yaml", model)):
        if content is not None:
            (folder / name).write_text(yaml.dump(content))
    return folder


def test_each_adapted_part_is_an_update_of_its_own(tmp_path: Path) -> None:
    tensors = pair(QKV)
    adapter = read_adapter(write(tmp_path / "final", tensors, model={**MODEL, "hf_config": {"org": "o", "name": "n"}}))
    assert (adapter.format, adapter.name, adapter.base_hint.name) == ("litgpt", "final", "o/n")
    a, b = (tensor.double().numpy() for tensor in tensors.values())
    expected = {
        "model.layers.5.self_attn.q_proj.weight": 3 * b[:12] @ a[:2],
        "model.layers.5.self_attn.v_proj.weight": 3 * b[12:] @ a[2:],
    }
    assert [update.target for update in adapter.updates] == list(expected)
    for update in adapter.updates:
        assert isinstance(update.update, LowRank)
        np.testing.assert_allclose(update.update.delta(), expected[update.target])


def test_a_base_that_mixes_them_by_group_gets_its_rows_in_that_order(tmp_path: Path) -> None:
    tensors = pair(QKV)
    adapter = read_adapter(write(tmp_path, tensors, model={**MODEL, "name": "pythia", "mlp_class_name": "GptNeoxMLP"}))
    (update,) = adapter.updates
    assert "gpt_neox.layers.5.attention.query_key_value.weight" in (update.target, *update.alternatives)
    assert isinstance(update.update, LowRank)
    a, b = (tensor.double().numpy() for tensor in tensors.values())
    query, value, zero = 3 * b[:12] @ a[:2], 3 * b[12:] @ a[2:], np.zeros((3, 12))
    expected = np.concatenate([query[:6], zero, value[:3], query[6:], zero, value[3:]])
    np.testing.assert_allclose(update.update.delta(), expected)


def test_a_state_dict_of_hand_written_modules_is_not_taken_for_litgpt(tmp_path: Path) -> None:
    torch.save({"lm_head.lora_A": torch.randn(2, 5), "lm_head.lora_B": torch.randn(7, 2)}, tmp_path / "a.pt")
    assert read_adapter(tmp_path / "a.pt", ReadOptions(alpha=2)).format == "state-dict"


def test_the_users_parts_and_alpha_stand_in_for_missing_settings(tmp_path: Path) -> None:
    folder = write(tmp_path, pair(QKV), None)
    adapter = read_adapter(folder, ReadOptions(alpha=4, enable_lora=(True, False, True)))
    assert [update.update.scale.value for update in adapter.updates if isinstance(update.update, LowRank)] == [2, 2]


PROJ = pair("transformer.h.0.attn.proj", rows=2)
BROKEN: dict[str, tuple[dict[str, Tensor], Any, Any, type[InputError], str]] = {
    "old names": (pair("transformer.h.0.attn.attn"), TOLD, MODEL, UnmergeableAdapterError, "an older release"),
    "with its base": (
        PROJ | {"transformer.h.0.attn.proj.linear.weight": torch.ones(2)},
        TOLD,
        MODEL,
        UnmergeableAdapterError,
        "base weights",
    ),
    "one factor": ({f"{QKV}.lora_A": torch.ones(4, 12)}, TOLD, MODEL, MalformedAdapterError, "has only lora_A"),
    "a foreign key": (PROJ | {"norm": torch.ones(2)}, TOLD, MODEL, MalformedAdapterError, "is no factor of litgpt's"),
    "no alpha": (PROJ, None, MODEL, MalformedAdapterError, "the scale alpha / r is unknown"),
    "no parts": (pair(QKV), {"lora_alpha": 6}, MODEL, MalformedAdapterError, "does not say which"),
    "no heads": (pair(QKV), TOLD, None, MalformedAdapterError, "names no n_head"),
    "other parts": (pair(QKV), TOLD | {"lora_key": True}, MODEL, MalformedAdapterError, "not of the parts T,T,T"),
    "another rank": (PROJ, TOLD | {"lora_r": 8}, MODEL, MalformedAdapterError, "says lora_r 8"),
    "alpha no number": (PROJ, TOLD | {"lora_alpha": "x"}, MODEL, MalformedAdapterError, "expected a number"),
    "heads that do not divide": (
        pair(QKV),
        TOLD,
        MODEL | {"n_query_groups": 3},
        MalformedAdapterError,
        "4 heads in 3 groups",
    ),
    "settings that are a list": (PROJ, [1], MODEL, MalformedAdapterError, "found a list"),
}


@pytest.mark.parametrize("case", BROKEN.values(), ids=BROKEN)
def test_what_breaks_the_rules_is_refused(
    tmp_path: Path, case: tuple[dict[str, Tensor], Any, Any, type[InputError], str]
) -> None:
    tensors, told, model, error, message = case
    with pytest.raises(error, match=message):
        read_adapter(write(tmp_path, tensors, told, model))


def test_yaml_that_would_make_objects_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, PROJ)
    (folder / "hyperparameters.yaml").write_text("a: !!python/object/apply:os.system ['true']")
    with pytest.raises(MalformedAdapterError, match="not YAML"):
        read_adapter(folder)
