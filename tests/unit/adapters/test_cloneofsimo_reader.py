"""Numbered adapters: read part by part, and named by the one order of the base's layers that their shapes fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from lora_deploy.adapter import Adapter, Naming
from lora_deploy.adapters.interface import ReadOptions
from lora_deploy.adapters.open import read_adapter
from lora_deploy.errors import (
    AmbiguousAdapterFormatError,
    IncompatibleAdapterError,
    MalformedAdapterError,
    RecipeError,
    UnmergeableAdapterError,
)
from lora_deploy.names.orders import orders_of
from lora_deploy.updates.low_rank import LowRank
from lora_deploy.validate import bind
from tests.builders import make_checkpoint, merged_values

CLASSES = {"CrossAttention", "Attention", "GEGLU", "CLIPAttention"}


def unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def text_encoder() -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=20, hidden_size=8, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2
    )
    return CLIPTextModel(config)


def found_by_training(model: nn.Module) -> list[str]:
    """The search of cloneofsimo's trainer, written again: linear layers in modules of its classes, in their order."""
    return [
        f"{path}.{inner}.weight"
        for path, owner in model.named_modules()
        if type(owner).__name__ in CLASSES
        for inner, layer in owner.named_modules()
        if isinstance(layer, nn.Linear)
    ]


def factors_for(model: nn.Module, names: list[str]) -> list[Tensor]:
    state = model.state_dict()
    return [
        tensor for name in names for tensor in (torch.randn(len(state[name]), 2), torch.randn(2, state[name].shape[1]))
    ]


@pytest.mark.parametrize("make", [unet, text_encoder], ids=lambda make: make.__name__)
def test_a_list_is_merged_into_the_layers_in_the_order_of_training(tmp_path: Path, make: object) -> None:
    model = make()  # type: ignore[operator]
    names = found_by_training(model)
    assert len(names) > 10
    tensors = factors_for(model, names)
    torch.save([tensor.half() for tensor in tensors], tmp_path / "lora_weight.pt")
    adapter = read_adapter(tmp_path / "lora_weight.pt")
    assert (adapter.format, adapter.naming) == ("cloneofsimo", Naming.POSITIONAL)
    base = make_checkpoint(tmp_path / "base", model.state_dict(), {"_class_name": "UNet2DConditionModel"})
    binding = bind([adapter], base)
    assert set(binding.updates) == set(names)
    merged = merged_values(binding)
    for name, up, down in zip(names, tensors[::2], tensors[1::2], strict=True):
        delta = up.half().double() @ down.half().double()
        assert torch.allclose(merged[name], model.state_dict()[name].double() + delta)


def test_an_adapter_of_before_diffusers_0_14_has_the_feed_forward_before_the_cross_attention(tmp_path: Path) -> None:
    model = unet()
    new, old = orders_of(model.state_dict())
    assert new == found_by_training(model)
    parts = [name.split(".transformer_blocks.0.")[1].split(".")[0] for name in old[:9]]
    assert parts == ["attn1"] * 4 + ["ff"] + ["attn2"] * 4
    tensors = factors_for(model, old)
    torch.save(tensors, tmp_path / "a.pt")
    base = make_checkpoint(tmp_path / "base", model.state_dict(), {"_class_name": "UNet2DConditionModel"})
    merged = merged_values(bind([read_adapter(tmp_path / "a.pt")], base))
    for name, up, down in zip(old, tensors[::2], tensors[1::2], strict=True):
        assert torch.allclose(merged[name], model.state_dict()[name].double() + up.double() @ down.double())


def save_parts(folder: Path, **parts: list[Tensor]) -> Path:
    tensors, metadata = {}, {}
    for part, factors in parts.items():
        metadata[part] = json.dumps(["CLIPAttention"])
        for k in range(len(factors) // 2):
            tensors[f"{part}:{k}:up"], tensors[f"{part}:{k}:down"] = factors[2 * k], factors[2 * k + 1]
            metadata[f"{part}:{k}:rank"] = str(len(factors[2 * k + 1]))
    save_file(tensors, folder / "lora.safetensors", metadata)
    return folder / "lora.safetensors"


def test_a_file_with_several_parts_asks_for_one(tmp_path: Path) -> None:
    model = text_encoder()
    path = save_parts(
        tmp_path, unet=[torch.randn(4, 1), torch.randn(1, 4)], text_encoder=factors_for(model, found_by_training(model))
    )
    with pytest.raises(AmbiguousAdapterFormatError, match="holds the parts") as caught:
        read_adapter(path)
    assert "--adapter-name" in str(caught.value.hint)
    adapter: Adapter = read_adapter(path, ReadOptions(adapter_name="text_encoder"))
    assert len(adapter.updates) == 12
    assert [finding.code for finding in adapter.findings] == ["unused-tensors"]
    with pytest.raises(RecipeError, match="no part 'vae'"):
        read_adapter(path, ReadOptions(adapter_name="vae"))


def test_no_scale_is_one_and_the_users_alpha_is_divided_by_the_rank(tmp_path: Path) -> None:
    path = save_parts(tmp_path, unet=[torch.randn(4, 2), torch.randn(2, 4)])
    for options, scale in ((ReadOptions(), 1), (ReadOptions(alpha=3), 1.5)):
        (found,) = read_adapter(path, options).updates
        assert isinstance(found.update, LowRank)
        assert found.update.scale.value == scale


def test_what_fits_no_order_says_where(tmp_path: Path) -> None:
    model = text_encoder()
    names = found_by_training(model)
    base = make_checkpoint(tmp_path / "base", model.state_dict(), {"model_type": "clip_text_model"})
    torch.save(factors_for(model, names)[:-2], tmp_path / "a.pt")
    with pytest.raises(IncompatibleAdapterError, match="11 modules for 12 attention"):
        bind([read_adapter(tmp_path / "a.pt")], base)
    wrong = factors_for(model, names)
    wrong[4] = torch.randn(9, 2)
    torch.save(wrong, tmp_path / "b.pt")
    with pytest.raises(IncompatibleAdapterError, match=r"module 2 is \(9, 8\).* is \(8, 8\)"):
        bind([read_adapter(tmp_path / "b.pt")], base)
    other = make_checkpoint(tmp_path / "other", {"a.weight": torch.ones(4, 4)}, {"model_type": "llama"})
    with pytest.raises(IncompatibleAdapterError, match="order of this model's layers is not known"):
        bind([read_adapter(tmp_path / "b.pt")], other)


def test_what_breaks_the_rules_is_refused(tmp_path: Path) -> None:
    pair = [torch.randn(4, 2), torch.randn(2, 4)]

    def refused(error: type[Exception], told: str, tensors: dict[str, Tensor], **metadata: str) -> None:
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "a.safetensors", metadata)
        with pytest.raises(error, match=told):
            read_adapter(tmp_path / "a.safetensors")

    both = {"unet:0:up": pair[0], "unet:0:down": pair[1]}
    refused(MalformedAdapterError, "has only up", {"unet:0:up": pair[0]})
    refused(MalformedAdapterError, "without gaps", {"unet:1:up": pair[0], "unet:1:down": pair[1]})
    refused(MalformedAdapterError, "expected <part>:<number>", both | {"norm": pair[0]})
    refused(MalformedAdapterError, "the header says 7", both, **{"unet:0:rank": "7"})
    refused(MalformedAdapterError, "expected a list", both, unet="{")
    refused(UnmergeableAdapterError, "ResnetBlock2D", both, unet='["ResnetBlock2D", "GEGLU"]')
    refused(UnmergeableAdapterError, "a trained token", both | {"<cat>": torch.ones(8)}, **{"<cat>": "<embed>"})
    torch.save([torch.ones(2, 2)], tmp_path / "odd.pt")
    with pytest.raises(MalformedAdapterError, match="expected pairs of tensors"):
        read_adapter(tmp_path / "odd.pt")
