"""Experts, fused in memory by transformers 5.23, stored one by one or fused, adapted fused or one by one (PEFT 0.21.2).

An adapter of single experts comes from transformers 4, and was trained with each expert's own formula. Loading it on
fused experts, PEFT 0.21.2 converts it for Mixtral, where a rank-stabilised scale takes the square root of the doubled
rank and is √2 too large, and drops it without a word for Qwen2-MoE.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.builders import save_peft
from tests.peer.models import gpt_oss, llama4, mixtral, qwen2_moe, token_ids
from tests.peer.trained import (
    assert_merges_as_trained,
    assert_rounded_once,
    merge,
    peft_advice_unheard,
    reload,
    save_base,
    tensors_of,
    train,
)

BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
REVERSED = BOTH[::-1]


@dataclass(frozen=True)
class Fused:
    name: str
    model: Callable[[], nn.Module]
    parameters: list[str]
    options: dict[str, Any] = field(default_factory=dict)
    targets: list[str] | str = field(default_factory=list)


FUSED = [
    *(
        Fused(f"{model.__name__}, {name}", model, parameters)
        for model in (mixtral, qwen2_moe, gpt_oss)
        for name, parameters in (("both", BOTH), ("reversed", REVERSED), ("up", BOTH[:1]), ("down", BOTH[1:]))
    ),
    *(
        Fused(f"{model.__name__}, its own rank", model, BOTH, {"rank_pattern": {"experts.down_proj": 2}})
        for model in (mixtral, gpt_oss)
    ),
    Fused("mixtral, rank-stabilised", mixtral, BOTH, {"use_rslora": True, "alpha_pattern": {".*down_proj": 3}}),
    Fused("mixtral, with attention", mixtral, BOTH, {}, ["q_proj", "o_proj"]),
    Fused("qwen2_moe, with the shared expert", qwen2_moe, BOTH, {}, ["shared_expert.up_proj", "shared_expert_gate"]),
    Fused("mixtral, router", mixtral, ["mlp.gate.weight", *BOTH]),
    Fused("mixtral, all-linear", mixtral, [], {}, "all-linear"),
    Fused("mixtral, all-linear and rank-stabilised", mixtral, [], {"use_rslora": True}, "all-linear"),
    Fused("mixtral, by the names of version 4", mixtral, [], {}, ["q_proj", "w1", "w2", "w3"]),
    Fused("mixtral, down by the name of version 4", mixtral, [], {}, ["q_proj", "w2"]),
    Fused("mixtral, square up", lambda: mixtral(intermediate_size=8), BOTH),
    Fused("mixtral, square down", lambda: mixtral(intermediate_size=16), BOTH),
    Fused("gpt_oss, square up", lambda: gpt_oss(intermediate_size=8), BOTH),
    Fused("gpt_oss, square down", lambda: gpt_oss(intermediate_size=16), BOTH),
    Fused("llama4", llama4, ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]),
    Fused("llama4, square", lambda: llama4(intermediate_size=8), ["experts.gate_up_proj", "experts.down_proj"]),
]


@pytest.mark.parametrize("is_fused_on_disk", [False, True], ids=["stored as released", "stored fused"])
@pytest.mark.parametrize("case", FUSED, ids=lambda case: case.name)
def test_fused_experts_merge_to_what_peft_0_21_2_merges_and_computes(
    case: Fused, is_fused_on_disk: bool, tmp_path: Path
) -> None:
    model = case.model()
    base = save_base(model, tmp_path / "base", save_original_format=not is_fused_on_disk)
    config = LoraConfig(
        r=3, lora_alpha=5, target_modules=case.targets, target_parameters=case.parameters, **case.options
    )
    trained = train(model, config, tmp_path, base=base)
    assert_merges_as_trained(trained, token_ids(), tmp_path / "out")
    assert set(tensors_of(tmp_path / "out")) == set(tensors_of(base))


@dataclass(frozen=True)
class OneByOne:
    """Names of single experts' projections, as transformers 4 had them and as they are on disk."""

    name: str
    model: Callable[..., nn.Module]
    path: str
    gate: str
    up: str
    down: str
    is_converted: bool
    """Whether PEFT applies such an adapter at all."""


SINGLE = [
    OneByOne("mixtral", mixtral, "model.layers.{}.block_sparse_moe.experts.{}", "w1", "w3", "w2", True),
    OneByOne("qwen2_moe", qwen2_moe, "model.layers.{}.mlp.experts.{}", "gate_proj", "up_proj", "down_proj", False),
]


def _factors(case: OneByOne, base: Mapping[str, Tensor], rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Random factors of every projection of every expert, by module."""
    generator = torch.Generator().manual_seed(11)
    modules = [
        f"{case.path.format(layer, e)}.{name}"
        for layer in range(2)
        for e in range(3)
        for name in (case.gate, case.up, case.down)
    ]
    shapes = {module: base[f"{module}.weight"].shape for module in modules}
    return {
        module: (torch.randn(rank, n_in, generator=generator), torch.randn(n_out, rank, generator=generator))
        for module, (n_out, n_in) in shapes.items()
    }


@pytest.mark.parametrize("is_fused_on_disk", [False, True], ids=["stored as released", "stored fused"])
@pytest.mark.parametrize("use_rslora", [False, True], ids=["plain", "rank-stabilised"])
@pytest.mark.parametrize("case", SINGLE, ids=lambda case: case.name)
def test_single_experts_merge_by_their_own_formula_whatever_peft_0_21_2_makes_of_them(
    case: OneByOne, use_rslora: bool, is_fused_on_disk: bool, tmp_path: Path
) -> None:
    model = case.model()
    base = tensors_of(save_base(model, tmp_path / "released"))
    folder = save_base(model, tmp_path / "base", save_original_format=not is_fused_on_disk)
    rank, alpha = 3, 5
    factors = _factors(case, base, rank)
    config = {
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": use_rslora,
        "target_modules": [case.gate, case.up, case.down],
        "task_type": "CAUSAL_LM",
    }
    keys = {
        f"base_model.model.{m}.lora_{s}.weight": t
        for m, pair in factors.items()
        for s, t in zip("AB", pair, strict=True)
    }
    adapter = save_peft(tmp_path / "adapter", keys, config)
    merge(adapter, folder, tmp_path / "out")

    scale = alpha / (math.sqrt(rank) if use_rslora else rank)
    deltas = {m: scale * (up.double() @ down.double()) for m, (down, up) in factors.items()}
    exact = {name: t.double() + deltas.get(name.removesuffix(".weight"), 0) for name, t in base.items()}
    fused = _in_memory(model, exact, tmp_path / "exact")
    loaded = reload(model, tmp_path / "out")
    assert_rounded_once({name: t.float() for name, t in loaded.state_dict().items()}, fused)

    with peft_advice_unheard():
        wrapped = PeftModel.from_pretrained(type(model).from_pretrained(folder).double(), adapter)
        by_peft = wrapped.merge_and_unload().state_dict()
    name = "model.layers.0.mlp.experts.gate_up_proj"
    original = model.state_dict()[name].double()
    ratio = (by_peft[name] - original).norm() / (fused[name] - original).norm()
    by_conversion = math.sqrt(2) if use_rslora else 1
    assert ratio.item() == pytest.approx(by_conversion if case.is_converted else 0, rel=1e-6)


def _in_memory(model: nn.Module, tensors: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Let transformers fuse the tensors of a checkpoint as released."""
    folder.mkdir()
    model.config.save_pretrained(folder)
    save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
    return reload(model, folder).state_dict()
