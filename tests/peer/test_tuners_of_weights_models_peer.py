"""The same tuners on models of transformers: what is drawn again needs all adapted layers, or their order.

The models' modules are created in another order (q, k, v, o; gate, up, down) than names are sorted in.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftConfig
from torch import nn

from lora_deploy.adapters.open import read_adapter
from lora_deploy.bases import open_base
from lora_deploy.errors import IncompatibleAdapterError
from lora_deploy.merge.identity import identify
from lora_deploy.merge.options import MergeOptions
from lora_deploy.merge.plan import plan_merge
from lora_deploy.validate import bind
from tests.peer.models import gpt2, llama, token_ids, toy
from tests.peer.trained import (
    assert_merges_as_trained,
    assert_rounded_once,
    merge,
    peft_advice_unheard,
    tensors_of,
    train,
)

LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
GPT2 = ["c_attn", "c_proj", "c_fc"]


def config(kind: str, targets: Any, **options: Any) -> PeftConfig:
    with peft_advice_unheard():
        return getattr(peft, f"{kind}Config")(target_modules=targets, **options)


DRAWN = [
    ("Vera", {"r": 3, "save_projection": False}),
    ("Pvera", {"r": 3, "save_projection": False}),
    ("TinyLora", {"r": 2, "u": 3}),
    ("TinyLora", {"r": 2, "u": 3, "save_projection": False}),
    ("TinyLora", {"r": 2, "u": 3, "weight_tying": 0.6, "save_projection": False}),
    ("UniLora", {"r": 2, "theta_d_length": 23}),
    ("UniLora", {"r": 2, "theta_d_length": 23, "save_indices": True}),
]
NAMES = [kind + "".join(f", {k} {v}" for k, v in options.items() if k not in {"r", "u"}) for kind, options in DRAWN]


@pytest.mark.parametrize(("kind", "options"), DRAWN, ids=NAMES)
@pytest.mark.parametrize(("make", "targets"), [(llama, LLAMA), (gpt2, GPT2)], ids=["Llama", "GPT-2"])
def test_what_all_layers_share_is_drawn_again_as_peft_0_21_2_draws_it(
    kind: str, options: dict[str, Any], make: Callable[[], nn.Module], targets: list[str], tmp_path: Path
) -> None:
    trained = train(make(), config(kind, targets, **options), tmp_path)
    assert_merges_as_trained(trained, token_ids(), tmp_path / "out")


@pytest.mark.parametrize(
    ("targets", "options"),
    [
        (r".*layers\.1\.(self_attn\.[qv]_proj|mlp\.up_proj)", {}),
        (["q_proj", "v_proj"], {"layers_to_transform": [1]}),
        (["q_proj", "v_proj"], {"layers_to_transform": 0, "layers_pattern": "layers"}),
        ("all-linear", {}),
    ],
    ids=["expression", "layers", "one layer", "all-linear"],
)
def test_the_modules_of_a_configuration_are_those_that_peft_0_21_2_adapts(
    targets: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    trained = train(llama(), config("UniLora", targets, r=2, theta_d_length=23, **options), tmp_path)
    assert_merges_as_trained(trained, token_ids(), tmp_path / "out")


@pytest.mark.parametrize("kind", ["UniLora", "TinyLora"])
def test_an_order_that_no_class_tells_is_said_to_be_unknown(kind: str, tmp_path: Path) -> None:
    options = {"save_projection": False} if kind == "TinyLora" else {}
    trained = train(toy(a=nn.Linear(4, 4), b=nn.Linear(4, 4)), config(kind, ["a", "b"], **options), tmp_path)
    with pytest.raises(IncompatibleAdapterError, match=r"model-unknown.*config\.json names no architecture"):
        merge(trained.adapter, trained.base, tmp_path / "out")


def test_the_largest_layer_must_be_in_the_base_where_projections_are_drawn_again(tmp_path: Path) -> None:
    trained = train(
        toy(a=nn.Linear(8, 4), b=nn.Linear(4, 6)), config("Vera", ["a", "b"], save_projection=False), tmp_path
    )
    smaller = train(toy(b=nn.Linear(4, 6)), config("Vera", ["b"]), tmp_path / "smaller")
    with pytest.raises(IncompatibleAdapterError, match=r"size of the largest layer.*a\.weight is not in base"):
        merge(trained.adapter, smaller.base, tmp_path / "out")


@pytest.mark.parametrize(
    ("kind", "targets", "options"),
    [
        ("Vera", ["a"], {"save_projection": False}),
        ("FourierFT", ["a"], {"n_frequency": 5}),
        ("TinyLora", LLAMA, {"save_projection": False}),
        ("UniLora", LLAMA, {}),
        ("Psoft", ["a"], {"r": 2}),
    ],
)
def test_a_drawing_names_the_library_that_draws(
    kind: str, targets: list[str], options: dict[str, Any], tmp_path: Path
) -> None:
    model = toy(a=nn.Linear(4, 4)) if targets == ["a"] else llama()
    trained = train(model, config(kind, targets, **options), tmp_path)
    (note,) = [finding for finding in read_adapter(trained.adapter).findings if finding.code == "drawn-again"]
    assert f"numpy {__import__('numpy').__version__}" in note.message or f"torch {torch.__version__}" in note.message
    assert "seed" in note.message or "prng_key" in note.message or kind == "Psoft"
    plan = plan_merge(bind([read_adapter(trained.adapter)], open_base(str(trained.base))), MergeOptions())
    assert identify(plan, None)["drawn"] == [note.message]


@pytest.mark.parametrize("kind", ["Vera", "Miss", "Gralora", "Shira", "Deft", "Peanut", "Delora"])
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_a_base_in_16_bits_is_rounded_once_from_float64(kind: str, tmp_path: Path) -> None:
    """The peer adds in the base's own dtype; here only the float64 sum is rounded."""
    options = {"r": 4} if kind == "Gralora" else {"r": 1} if kind == "Shira" else {"r": 2}
    model = toy(a=nn.Linear(8, 4), b=nn.Linear(4, 6)).bfloat16()
    trained = train(model, config(kind, ["a", "b"], **options), tmp_path)
    merge(trained.adapter, trained.base, tmp_path / "out", dtype="base")
    found = tensors_of(tmp_path / "out")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert_rounded_once(found, trained.merged(), noise=2e-6 if kind == "Deft" else 0)
