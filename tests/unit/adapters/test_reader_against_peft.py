"""One adapter of each kind, trained nowhere but perturbed everywhere, saved by PEFT, read by us, merged by both."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import config as lora_config
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from lora_deploy.adapters.interface import ReadOptions
from lora_deploy.adapters.open import read_adapter
from tests.unit.adapters.apply import apply_adapter

EXACT = 1e-9
SINGLE_FACTORISATION = 1e-5
"""PEFT factorises in float32."""


class Layers(nn.Module):
    """One layer of every class that PEFT adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 4)
        self.wide = nn.Linear(4, 8, bias=False)
        self.c1d = Conv1D(5, 4)
        self.emb = nn.Embedding(11, 6)
        self.conv1 = nn.Conv1d(3, 4, 5)
        self.conv2 = nn.Conv2d(3, 4, 3)
        self.conv3 = nn.Conv3d(2, 4, (1, 2, 3))
        self.point = nn.Conv2d(3, 4, 1)
        self.mha = nn.MultiheadAttention(8, 2)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x


class Experts(nn.Module):
    """Two stacks and a matrix of parameters, in an order that is not the alphabet's."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 10, 4))
        self.down = nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, x: Tensor) -> Tensor:
        return x


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()
        self.lin = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x


def tied_llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=19,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


@dataclass(frozen=True)
class Variant:
    name: str
    targets: list[str] | str | None
    options: dict[str, Any] = field(default_factory=dict)
    kinds: set[str] = field(default_factory=lambda: {"low-rank"})
    model: Callable[[], nn.Module] = Layers
    tolerance: float = EXACT
    dtype: torch.dtype = torch.float64


VARIANTS = [
    Variant("linear", ["lin", "wide"]),
    Variant("rank-stabilised", ["lin", "wide"], {"use_rslora": True}),
    Variant(
        "patterns",
        ["lin", "wide", "head"],
        {"rank_pattern": {"li.": 3, "head": 1}, "alpha_pattern": {"w[hi]de": 5, "lin": 2}},
    ),
    Variant("Conv1D", ["c1d"], {"fan_in_fan_out": True}),
    Variant("convolutions", ["conv1", "conv2", "conv3", "point"]),
    Variant("embedding", ["emb"]),
    Variant("attention", ["mha"]),
    Variant("DoRA of linear layers", ["lin", "wide"], {"use_dora": True}, {"dora"}),
    Variant("DoRA of Conv1D", ["c1d"], {"use_dora": True, "fan_in_fan_out": True}, {"dora"}),
    Variant("DoRA of convolutions", ["conv1", "conv2", "conv3", "point"], {"use_dora": True}, {"dora"}),
    Variant("DoRA of an embedding", ["emb"], {"use_dora": True}, {"dora"}),
    Variant("bias of the update", ["lin", "conv2"], {"lora_bias": True}, {"low-rank", "addition"}),
    Variant("all biases", ["lin"], {"bias": "all"}, {"low-rank", "replacement"}),
    Variant("biases of adapted layers", ["lin", "c1d"], {"bias": "lora_only"}, {"low-rank", "replacement"}),
    Variant("saved modules", ["lin"], {"modules_to_save": ["head", "mha"]}, {"low-rank", "replacement"}),
    Variant("token rows", ["lin"], {"trainable_token_indices": {"emb": [7, 0, 3]}}, {"low-rank", "token-rows"}),
    Variant(
        "PiSSA",
        ["lin", "wide"],
        {"init_lora_weights": "pissa"},
        {"residual"},
        Layers,
        SINGLE_FACTORISATION,
        torch.float32,
    ),
    Variant(
        "PiSSA of Conv1D",
        ["c1d"],
        {"init_lora_weights": "pissa", "fan_in_fan_out": True},
        {"residual"},
        Layers,
        SINGLE_FACTORISATION,
        torch.float32,
    ),
    Variant(
        "PiSSA with DoRA",
        ["lin"],
        {"init_lora_weights": "pissa", "use_dora": True},
        {"dora"},
        Layers,
        SINGLE_FACTORISATION,
        torch.float32,
    ),
    Variant(
        "OLoRA",
        ["lin", "wide"],
        {"init_lora_weights": "olora"},
        {"residual"},
        Layers,
        SINGLE_FACTORISATION,
        torch.float32,
    ),
    Variant(
        "KaSA",
        ["lin", "wide"],
        {"kasa_config": lora_config.KasaConfig()},
        {"kasa"},
        Layers,
        SINGLE_FACTORISATION,
        torch.float64,
    ),
    Variant(
        "BD-LoRA",
        ["lin", "wide"],
        {"use_bdlora": lora_config.BdLoraConfig(target_modules_bd_a=["lin"], target_modules_bd_b=["wide"], nblocks=2)},
    ),
    Variant("VeLoRA", ["lin"], {"velora_config": lora_config.VeloraConfig(num_groups=2)}),
    Variant("MonteCLoRA", ["lin"], {"monteclora_config": lora_config.MontecloraConfig(num_samples=2)}),
    Variant(
        "parameters of experts",
        ["lin"],
        {"target_parameters": ["experts.down", "experts.up"], "rank_pattern": {"experts.up": 3}},
        {"low-rank", "experts"},
        Mixture,
    ),
    Variant("one parameter", [], {"target_parameters": ["experts.down"]}, {"experts"}, Mixture),
]


def perturb(model: nn.Module) -> None:
    """Move every tensor that training can move away from its start, magnitudes staying positive."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or "lora_" in name:
            noise = torch.randn_like(parameter)
            parameter.data.add_(noise.abs() if "magnitude" in name else noise)  # in place: tied factors stay tied


def save_perturbed(base: nn.Module, config: LoraConfig, folder: Path) -> PeftModel:
    """Adapt a copy of the base, perturb and save; PEFT's advice about what we do on purpose is not heard."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model = get_peft_model(copy.deepcopy(base), config)
        perturb(peft_model)
        peft_model.save_pretrained(folder)
    return peft_model


def stored_as_in_out(model: nn.Module) -> frozenset[str]:
    return frozenset(f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_what_is_read_merges_to_what_peft_0_21_merges(variant: Variant, tmp_path: Path) -> None:
    torch.manual_seed(3)
    base = variant.model().to(variant.dtype)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=variant.targets, **variant.options)
    peft_model = save_perturbed(base, config, tmp_path)

    adapter = read_adapter(tmp_path, ReadOptions())
    kinds = {getattr(update.update, "kind", "experts") for update in adapter.updates}
    merged = apply_adapter(adapter, base.state_dict(), stored_as_in_out(base))
    expected = peft_model.merge_and_unload().state_dict()

    assert kinds == variant.kinds
    assert adapter.format == "peft"
    assert set(merged) == set(expected)
    changed = [name for name in merged if not torch.equal(merged[name], base.state_dict()[name].double())]
    assert changed
    for name, tensor in expected.items():
        torch.testing.assert_close(
            merged[name], tensor.to(torch.float64), rtol=variant.tolerance, atol=variant.tolerance, msg=name
        )


def test_an_adapter_that_keeps_embeddings_tied_is_applied_once(tmp_path: Path) -> None:
    torch.manual_seed(3)
    base = tied_llama().to(torch.float64)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["embed_tokens"], ensure_weight_tying=True)
    peft_model = save_perturbed(base, config, tmp_path)
    embedding = peft_model.get_input_embeddings()

    adapter = read_adapter(tmp_path, ReadOptions())
    merged = apply_adapter(adapter, base.state_dict())

    factors = embedding.lora_embedding_A["default"], embedding.lora_embedding_B["default"]
    once = base.get_input_embeddings().weight + 3 * (factors[1] @ factors[0]).T
    torch.testing.assert_close(merged["model.embed_tokens.weight"], once.detach(), rtol=EXACT, atol=EXACT)
    assert [update.target for update in adapter.updates] == ["model.embed_tokens.weight"]
    assert len(adapter.updates[0].keys) == 4
    assert "tied-once" in {finding.code for finding in adapter.findings}
    assert adapter.base_names == {"model.embed_tokens.weight", "lm_head.weight"}
