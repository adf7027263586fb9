"""Files of the same tuners as they come: older names, biases and heads beside them, and what has to be refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_deploy.adapters.interface import ReadOptions
from lora_deploy.adapters.open import read_adapter
from lora_deploy.errors import (
    AmbiguousAdapterFormatError,
    IncompatibleAdapterError,
    LoraDeployError,
    MalformedAdapterError,
    NonFiniteTensorError,
    UnmergeableAdapterError,
)
from lora_deploy.validate import BindOptions
from tests.peer.models import llama, token_ids, toy
from tests.peer.trained import (
    Trained,
    assert_merges_as_trained,
    assert_rounded_once,
    merge,
    peft_advice_unheard,
    tensors_of,
    train,
)

Tensors = dict[str, Tensor]


def config(kind: str, **options: Any) -> PeftConfig:
    with peft_advice_unheard():
        return getattr(peft, f"{kind}Config")(**{"target_modules": ["a", "b"], **options})


def trained_toy(kind: str, folder: Path, **options: Any) -> Trained:
    return train(toy(a=nn.Linear(8, 4), b=nn.Linear(4, 6)), config(kind, **options), folder)


def edit(adapter: Path, change: Callable[[Tensors], Tensors] = lambda tensors: tensors, **settings: Any) -> Path:
    """Rewrite a saved adapter."""
    file, config_file = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    tensors = change(dict(load_file(file)))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | settings))
    return adapter


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


@pytest.mark.parametrize("mode", [True, "bat"])
def test_bone_is_miss_under_its_older_name(mode: bool | str, tmp_path: Path) -> None:
    trained = trained_toy("Miss", tmp_path, r=2, init_weights=mode)
    edit(trained.adapter, renamed("miss_block", "bone_block"), peft_type="BONE")
    merge(trained.adapter, trained.base, tmp_path / "out")
    assert_rounded_once(tensors_of(tmp_path / "out"), trained.merged())


@pytest.mark.parametrize("kind", ["Vera", "VBLoRA", "Gralora", "Peanut", "Psoft", "OSF", "TinyLora"])
def test_a_raw_state_dict_carries_the_adapters_name_and_is_read_like_the_saved_file(kind: str, tmp_path: Path) -> None:
    options = {
        "VBLoRA": {"vector_length": 2},
        "Psoft": {"r": 2},
        "Gralora": {"r": 2, "hybrid_r": 1},
        "Peanut": {"depth": 1},
    }
    trained = trained_toy(kind, tmp_path, **options.get(kind, {}))
    marks = tuple(f"{kind.lower()}_{end}" for end in ("", "svd_params"))
    raw = {
        name: tensor.float()
        for name, tensor in trained.model.state_dict().items()
        if any(mark in name for mark in marks)
        and not (
            name.startswith("base_model.model.")
            and any(part in name for part in (".vera_A", ".vera_B", "_bank", "tinylora_v"))
        )
    }
    saved = load_file(trained.adapter / "adapter_model.safetensors")
    assert len(raw) == len(saved)
    edit(trained.adapter, lambda _: raw)
    merge(trained.adapter, trained.base, tmp_path / "out")
    assert_rounded_once(tensors_of(tmp_path / "out"), trained.merged(), noise=2e-6)


def test_another_adapter_in_a_raw_state_dict_is_a_choice(tmp_path: Path) -> None:
    trained = trained_toy("Miss", tmp_path, r=2)

    def twice(tensors: Tensors) -> Tensors:
        return {
            f"{name}.{which}": tensor * k for name, tensor in tensors.items() for k, which in enumerate(["no", "yes"])
        }

    edit(trained.adapter, twice)
    with pytest.raises(AmbiguousAdapterFormatError, match="holds 2 adapters: no, yes"):
        read_adapter(trained.adapter)
    merge(trained.adapter, trained.base, tmp_path / "out", read=ReadOptions(adapter_name="yes"))
    assert_rounded_once(tensors_of(tmp_path / "out"), trained.merged())


@pytest.mark.parametrize("bias", ["all", "vera_only"])
def test_trained_biases_and_whole_modules_beside_a_tuner_replace_the_bases(bias: str, tmp_path: Path) -> None:
    model = toy(a=nn.Linear(8, 4), b=nn.Linear(4, 6), c=nn.Linear(6, 6))
    trained = train(model, config("Vera", r=2, bias=bias, modules_to_save=["c"]), tmp_path)
    inputs = {"x": torch.randn(5, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)}
    assert_merges_as_trained(trained, inputs, tmp_path / "out")


def test_an_embedding_is_adapted_by_tinylora_as_peft_0_21_2_does(tmp_path: Path) -> None:
    trained = train(
        llama(),
        config("TinyLora", r=2, u=3, target_modules=["embed_tokens", "q_proj"]),
        tmp_path,
        save_embedding_layers=False,
    )
    assert_merges_as_trained(trained, token_ids(), tmp_path / "out")


def test_a_weight_multiplies_what_a_tuner_adds_and_excluded_layers_stay(tmp_path: Path) -> None:
    trained = trained_toy("Vera", tmp_path, r=2, save_projection=False)
    options = BindOptions(weights=(0.5,), exclude=("b.*",))
    merge(trained.adapter, trained.base, tmp_path / "out", bind_options=options)
    found, base, merged = tensors_of(tmp_path / "out"), tensors_of(trained.base), trained.merged()
    halfway = (base["a.weight"].double() + merged["a.weight"]) / 2
    assert_rounded_once({"a": found["a.weight"], "b": found["b.weight"]}, {"a": halfway, "b": base["b.weight"]})


def test_a_weight_of_what_is_not_linear_is_refused(tmp_path: Path) -> None:
    trained = trained_toy("Deft", tmp_path, r=2, para=True)
    with pytest.raises(IncompatibleAdapterError, match=r"a subspace update cannot be weighted: found weight 0\.5"):
        merge(trained.adapter, trained.base, tmp_path / "out", bind_options=BindOptions(weights=(0.5,)))


REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], Callable[[Tensors], Tensors], type[LoraDeployError], str]] = [
    ("RandLora", {"save_projection": False}, {}, dict, UnmergeableAdapterError, "bfloat16 or float16"),
    (
        "Frod",
        {"save_projection": False, "progressbar": False},
        {},
        dict,
        UnmergeableAdapterError,
        "joint decomposition",
    ),
    (
        "Supertuning",
        {"save_precomputed_indices": False, "sparsity": 0.5},
        {},
        dict,
        UnmergeableAdapterError,
        "equal weights leave open",
    ),
    ("WaveFT", {"wavelet_family": "db2", "n_frequency": 5}, {}, dict, UnmergeableAdapterError, "only db1"),
    ("Pvera", {"sample_at_inference": True}, {}, dict, UnmergeableAdapterError, "drawn at random"),
    ("FourierFT", {"n_frequency": 5}, {"random_loc_seed": None}, dict, UnmergeableAdapterError, "places are not known"),
    ("Peanut", {}, {"act_fn": "xielu"}, dict, UnmergeableAdapterError, "act_fn 'xielu'"),
    ("Vera", {}, {"variant": "new"}, dict, UnmergeableAdapterError, "variant='new', unknown to peft"),
    ("Vera", {}, {"r": -1}, dict, MalformedAdapterError, "r: input should be greater than 0"),
    ("Vera", {}, {}, without("vera_B"), MalformedAdapterError, "no vera_B"),
    ("Vera", {}, {}, without("a.vera_lambda_d"), MalformedAdapterError, "has vera_lambda_b but no vera_lambda_d"),
    ("Vera", {}, {}, lambda t: t | {"base_model.other": torch.ones(1)}, MalformedAdapterError, "base_model.other"),
    (
        "Vera",
        {},
        {},
        lambda t: t | {"base_model.model.a.lora_A.weight": torch.ones(1, 8)},
        MalformedAdapterError,
        "another tuner",
    ),
    ("Miss", {"r": 2}, {"r": 3}, dict, MalformedAdapterError, "the configuration says r 3"),
    ("Gralora", {"r": 4}, {"r": 2}, dict, MalformedAdapterError, r"expected \(2, \?, 2\)"),
    ("OSF", {}, {"effective_rank": 1}, dict, MalformedAdapterError, "keeps the 1 largest"),
    ("TinyLora", {"u": 3}, {"weight_tying": 1.0}, dict, MalformedAdapterError, "needs 1"),
    ("VBLoRA", {"vector_length": 2}, {"num_vectors": 9}, dict, MalformedAdapterError, r"expected \(9, 2\)"),
    (
        "Supertuning",
        {"sparsity": 0.5},
        {"r": 2, "lora_alpha": 1},
        dict,
        MalformedAdapterError,
        "the configuration's r is 2",
    ),
    ("Peanut", {"depth": 1}, {"depth": 0}, dict, MalformedAdapterError, "holds 4 tensors, depth 0 has 2"),
    ("Deft", {"r": 2}, {"para": True}, dict, MalformedAdapterError, "para is set"),
    (
        "Vera",
        {},
        {},
        lambda t: {name: tensor * float("nan") for name, tensor in t.items()},
        NonFiniteTensorError,
        "NaN",
    ),
]


@pytest.mark.parametrize(
    ("kind", "options", "settings", "change", "error", "message"),
    REFUSED,
    ids=[f"{case[0]}: {case[5]}" for case in REFUSED],
)
def test_what_cannot_be_merged_is_refused_with_its_reason(
    kind: str,
    options: dict[str, Any],
    settings: dict[str, Any],
    change: Callable[[Tensors], Tensors],
    error: type[LoraDeployError],
    message: str,
    tmp_path: Path,
) -> None:
    trained = trained_toy(kind, tmp_path, **options)
    edit(trained.adapter, change, **settings)
    with pytest.raises(error, match=message):
        read_adapter(trained.adapter)


MISFITS: list[tuple[str, dict[str, Any], str]] = [
    ("Vera", {}, r"update of a layer \(out, in\) = \(4, \?\), base is \(2, 3\)"),
    ("RandLora", {"r": 2}, "smaller side of 4"),
    (
        "Miss",
        {"init_weights": "mini", "mini_r": 4, "r": 2, "target_modules": ["a"]},
        "repeated every 4 outputs, base has 2",
    ),
    ("Miss", {"init_weights": "bat", "r": 2}, r"\(4, \?\), base is \(2, 3\)"),
    ("FourierFT", {"n_frequency": 20}, "20 coefficients, base only 6 elements"),
    ("Shira", {"r": 1, "random_seed": 1}, "places up to"),
    ("Supertuning", {"sparsity": 0.2}, "places up to"),
    ("Psoft", {"r": 4}, r"R is \(4, 4\)"),
]


@pytest.mark.parametrize(
    ("kind", "options", "message"), MISFITS, ids=[f"{kind} {message}" for kind, _, message in MISFITS]
)
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_a_base_of_another_size_is_a_misfit(kind: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    trained = trained_toy(kind, tmp_path, **options)
    other = train(toy(a=nn.Linear(3, 2), b=nn.Linear(4, 6)), config("Miss", r=2), tmp_path / "other")
    with pytest.raises(IncompatibleAdapterError, match=message):
        merge(trained.adapter, other.base, tmp_path / "out")
