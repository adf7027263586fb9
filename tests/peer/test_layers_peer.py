"""Every layer class that PEFT's LoRA adapts, alone and with DoRA or a bias of its own, against PEFT 0.21.2."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from lora_deploy.errors import IncompatibleAdapterError, UnmergeableAdapterError
from tests.peer.models import SelfAttention, conv1d, toy
from tests.peer.trained import assert_merges_as_trained, assert_rounded_once, forward, merge, tensors_of, train


@dataclass(frozen=True)
class Layer:
    name: str
    make: Callable[[], nn.Module]
    input: Callable[[], Tensor]
    options: dict[str, Any] = field(default_factory=dict)


def _numbers(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def _tokens() -> Tensor:
    return torch.arange(22).reshape(2, 11) % 13


LAYERS = [
    Layer("Linear", lambda: toy(m=nn.Linear(6, 4)), _numbers(5, 6)),
    Layer("square Linear", lambda: toy(m=nn.Linear(6, 6)), _numbers(5, 6)),
    Layer("Linear without bias", lambda: toy(m=nn.Linear(6, 4, bias=False)), _numbers(5, 6)),
    Layer("Conv1D", lambda: toy(m=conv1d(6, 4)), _numbers(5, 6), {"fan_in_fan_out": True}),
    Layer("Conv1D without its flag", lambda: toy(m=conv1d(6, 4)), _numbers(5, 6), {"fan_in_fan_out": False}),
    Layer("Conv1d", lambda: toy(m=nn.Conv1d(3, 4, 5)), _numbers(2, 3, 9)),
    Layer("Conv2d", lambda: toy(m=nn.Conv2d(3, 4, 3)), _numbers(2, 3, 7, 7)),
    Layer("Conv3d", lambda: toy(m=nn.Conv3d(2, 4, (1, 2, 3))), _numbers(2, 2, 5, 5, 5)),
    Layer(
        "strided, padded Conv2d",
        lambda: toy(m=nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=1)),
        _numbers(2, 3, 9, 9),
    ),
    Layer("strided Conv1d", lambda: toy(m=nn.Conv1d(3, 4, 3, stride=2, padding=2)), _numbers(2, 3, 9)),
    Layer("1x1 Conv2d", lambda: toy(m=nn.Conv2d(3, 4, 1)), _numbers(2, 3, 5, 5)),
    Layer("Embedding", lambda: toy(m=nn.Embedding(13, 6)), _tokens),
    Layer("square Embedding", lambda: toy(m=nn.Embedding(13, 13)), _tokens),
]


OPTIONS = ("plain", "use_rslora", "use_dora", "lora_bias")
CASES = [
    pytest.param(layer, option, id=f"{layer.name}, {option}")
    for layer in LAYERS
    for option in OPTIONS
    if option != "lora_bias" or getattr(layer.make().m, "bias", None) is not None  # PEFT needs a bias to add it to
]


@pytest.mark.parametrize(("layer", "option"), CASES)
def test_a_layer_merges_to_what_peft_0_21_2_merges_and_computes_what_it_was_trained_to(
    layer: Layer, option: str, tmp_path: Path
) -> None:
    options = {} if option == "plain" else {option: True}
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["m"], **layer.options, **options)
    trained = train(layer.make(), config, tmp_path)
    assert_merges_as_trained(trained, {"x": layer.input()}, tmp_path / "out")


def test_attention_of_torch_gets_its_output_projection_twice_as_peft_0_21_2_trains_it(tmp_path: Path) -> None:
    """PEFT adds the update of ``out_proj`` in its own layer and in the attention's, in forward and in merge alike."""
    model = toy(first=SelfAttention(), second=nn.Linear(8, 8))
    trained = train(model, LoraConfig(r=2, lora_alpha=6, target_modules=["attn", "second"]), tmp_path)
    factors = trained.model.base_model.model.first.attn.base_layer.out_proj
    delta = 3 * factors.lora_B["default"].weight @ factors.lora_A["default"].weight
    assert_merges_as_trained(trained, {"x": _numbers(3, 5, 8)()}, tmp_path / "out")
    name = "first.attn.out_proj.weight"
    assert_rounded_once(
        {name: tensors_of(tmp_path / "out")[name]}, {name: (trained.bare.state_dict()[name] + 2 * delta).detach()}
    )


def test_a_square_conv1d_of_an_unknown_model_is_decided_by_the_flag_that_peft_0_21_2_wrote(tmp_path: Path) -> None:
    trained = train(toy(m=conv1d(6, 6)), LoraConfig(r=2, target_modules=["m"], fan_in_fan_out=False), tmp_path)
    assert_merges_as_trained(trained, {"x": _numbers(5, 6)()}, tmp_path / "out")


def test_layers_merge_to_the_bytes_of_float64_rounded_once_in_the_base_dtype(tmp_path: Path) -> None:
    modules = {
        layer.name.replace(" ", "_").replace(",", ""): layer.make().m for layer in LAYERS if "1D" not in layer.name
    }
    config = LoraConfig(r=3, lora_alpha=5, target_modules=list(modules), rank_pattern={"Conv2d": 2})
    trained = train(toy(**modules), config, tmp_path)
    merge(trained.adapter, trained.base, tmp_path / "out", dtype="base")
    assert_rounded_once(tensors_of(tmp_path / "out"), trained.merged())


def test_a_dilated_convolution_merges_as_peft_0_21_2_merges_it_whose_forward_pass_does_not_dilate_the_update(
    tmp_path: Path,
) -> None:
    """No kernel holds both a dilated base and an update that is not: only PEFT's merge can be the oracle here.

    Where the padding does not happen to be "same", PEFT cannot train such a layer at all: the shapes differ.
    """
    layer = nn.Conv2d(3, 4, 3, padding="same", dilation=2)
    trained = train(toy(m=layer), LoraConfig(r=2, target_modules=["m"]), tmp_path)
    merge(trained.adapter, trained.base, tmp_path / "out")
    inputs = {"x": _numbers(2, 3, 7, 7)()}
    expected, merged = trained.output(inputs), trained.merged_model()
    assert_rounded_once(tensors_of(tmp_path / "out"), merged.state_dict())
    assert not torch.allclose(forward(merged, inputs), expected, rtol=0.1)


@pytest.mark.parametrize("groups", [2, 4])
def test_a_grouped_convolution_is_refused_as_peft_0_21_2_refuses_to_merge_it(groups: int, tmp_path: Path) -> None:
    model = toy(m=nn.Conv2d(4, 8, 3, groups=groups))
    trained = train(model, LoraConfig(r=4, target_modules=["m"]), tmp_path)
    with pytest.raises(NotImplementedError, match="groups"):
        trained.merged()
    with pytest.raises((UnmergeableAdapterError, IncompatibleAdapterError), match="group"):
        merge(trained.adapter, trained.base, tmp_path / "out")
