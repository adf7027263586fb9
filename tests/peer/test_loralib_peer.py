"""State dicts of loralib 0.1.2 and of the hand-written module of tutorials: factors beside weights, no alpha."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import loralib
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_deploy.adapters.interface import ReadOptions
from lora_deploy.errors import AmbiguousAdapterFormatError, IncompatibleAdapterError, MalformedAdapterError
from tests.peer.models import Toy
from tests.peer.trained import assert_rounded_once, assert_same_output, forward, merge, perturb, tensors_of

ALPHA = 5


def _numbers(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def _tokens() -> Tensor:
    return torch.arange(22).reshape(2, 11) % 13


@dataclass(frozen=True)
class Layer:
    name: str
    adapted: Callable[[], nn.Module]
    plain: Callable[[], nn.Module]
    input: Callable[[], Tensor]
    enable_lora: tuple[bool, ...] | None = None


OPTIONS = {"r": 3, "lora_alpha": ALPHA, "merge_weights": False}
QV = (True, False, True)


class _InOut(nn.Linear):
    """A linear layer that stores (in, out)."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_out, n_in)
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


LAYERS = [
    Layer("Linear", lambda: loralib.Linear(6, 4, **OPTIONS), lambda: nn.Linear(6, 4), _numbers(5, 6)),
    Layer("square Linear", lambda: loralib.Linear(6, 6, **OPTIONS), lambda: nn.Linear(6, 6), _numbers(5, 6)),
    Layer(
        "Linear, fan_in_fan_out",
        lambda: loralib.Linear(6, 4, fan_in_fan_out=True, **OPTIONS),
        lambda: _InOut(6, 4),
        _numbers(5, 6),
    ),
    Layer("Embedding", lambda: loralib.Embedding(13, 6, **OPTIONS), lambda: nn.Embedding(13, 6), _tokens),
    *(
        Layer(
            f"MergedLinear, {enabled}",
            lambda enabled=enabled: loralib.MergedLinear(6, 12, enable_lora=list(enabled), **OPTIONS),
            lambda: nn.Linear(6, 12),
            _numbers(5, 6),
            enabled,
        )
        for enabled in (QV, (True, True, True), (False, True, False), (True, False))
    ),
    Layer(
        "MergedLinear, fan_in_fan_out",
        lambda: loralib.MergedLinear(6, 12, enable_lora=list(QV), fan_in_fan_out=True, **OPTIONS),
        lambda: _InOut(6, 12),
        _numbers(5, 6),
        QV,
    ),
]
CONVOLUTIONS = [
    Layer("Conv2d", lambda: loralib.Conv2d(3, 4, 3, **OPTIONS), lambda: nn.Conv2d(3, 4, 3), _numbers(2, 3, 6, 6)),
    Layer(
        "grouped Conv2d",
        lambda: loralib.Conv2d(4, 6, 3, groups=2, **OPTIONS),
        lambda: nn.Conv2d(4, 6, 3, groups=2),
        _numbers(2, 4, 6, 6),
    ),
    Layer(
        "Conv1d, one wide", lambda: loralib.Conv1d(3, 4, 1, **OPTIONS), lambda: nn.Conv1d(3, 4, 1), _numbers(2, 3, 6)
    ),
]


def _trained(layer: Layer) -> nn.Module:
    """An adapted layer that is not in its starting position, and not merged."""
    generator = torch.Generator().manual_seed(7)
    adapted = Toy(m=layer.adapted()).train()
    for parameter in adapted.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    perturb(adapted)
    return adapted


def _merge_by_loralib(adapted: nn.Module) -> dict[str, Tensor]:
    """Loralib's own merge, in float64, without its factors."""
    merged = copy.deepcopy(adapted).double()
    merged.m.merge_weights = True
    merged.eval()
    assert merged.m.merged
    return {name: t.detach() for name, t in merged.state_dict().items() if "lora_" not in name}


CASES = [
    *(pytest.param(layer, True, id=f"{layer.name}, full state dict") for layer in [*LAYERS, *CONVOLUTIONS]),
    *(pytest.param(layer, False, id=f"{layer.name}, factors only") for layer in LAYERS),
]


def _save(adapted: nn.Module, folder: Path, *, is_full: bool) -> tuple[Path, Path]:
    """Save the adapter, with or without the weights below it, and a base of its own."""
    state = {name: t.detach().contiguous() for name, t in adapted.state_dict().items()}
    factors = {name: t.contiguous() for name, t in loralib.lora_state_dict(adapted).items()}
    adapter, base = folder / "adapter.safetensors", folder / "base.safetensors"
    save_file(state if is_full else factors, adapter)
    save_file({name: t for name, t in state.items() if "lora_" not in name}, base)
    return adapter, base


@pytest.mark.parametrize(("layer", "is_full"), CASES)
def test_a_layer_merges_to_what_loralib_0_1_2_merges_and_computes_what_it_was_trained_to(
    layer: Layer, is_full: bool, tmp_path: Path
) -> None:
    adapted = _trained(layer)
    adapter, base = _save(adapted, tmp_path, is_full=is_full)
    merge(adapter, base, tmp_path / "out", read=ReadOptions(alpha=ALPHA, enable_lora=layer.enable_lora))
    found = tensors_of(tmp_path / "out")
    assert_rounded_once(found, _merge_by_loralib(adapted))

    plain, inputs = Toy(m=layer.plain()).double(), {"x": layer.input()}
    plain.load_state_dict({name.replace(".conv.", "."): t for name, t in load_file(base).items()})
    before = forward(plain, inputs)
    plain.load_state_dict({name.replace(".conv.", "."): t for name, t in found.items()})
    assert_same_output(forward(plain, inputs), forward(adapted.double(), inputs), before)


@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=lambda layer: layer.name)
def test_a_convolution_of_loralib_0_1_2_without_its_weight_is_refused_since_nothing_says_what_it_is(
    layer: Layer, tmp_path: Path
) -> None:
    adapter, base = _save(_trained(layer), tmp_path, is_full=False)
    with pytest.raises(IncompatibleAdapterError, match=r"target-missing +m\.weight"):
        merge(adapter, base, tmp_path / "out", read=ReadOptions(alpha=ALPHA))


def test_a_merged_linear_of_loralib_0_1_2_is_not_guessed_at(tmp_path: Path) -> None:
    layer = next(layer for layer in LAYERS if layer.enable_lora == QV)
    save_file(loralib.lora_state_dict(_trained(layer)), tmp_path / "adapter.safetensors")
    with pytest.raises(AmbiguousAdapterFormatError, match="merged linear layer") as caught:
        merge(tmp_path / "adapter.safetensors", tmp_path, tmp_path / "out", read=ReadOptions(alpha=ALPHA))
    assert "--enable-lora" in str(caught.value.hint)


def test_alpha_of_loralib_0_1_2_is_not_guessed_at(tmp_path: Path) -> None:
    save_file(loralib.lora_state_dict(_trained(LAYERS[0])), tmp_path / "adapter.safetensors")
    with pytest.raises(MalformedAdapterError, match="alpha") as caught:
        merge(tmp_path / "adapter.safetensors", tmp_path, tmp_path / "out")
    assert "--alpha" in str(caught.value.hint)


# ------------------------------------------------------------------------------------------- the module of tutorials


class HandWritten(nn.Module):
    """What every tutorial writes: a frozen weight, two factors, and their sum in the forward pass."""

    def __init__(self, n_in: int, n_out: int, rank: int, alpha: float, *, turned: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.bias = nn.Parameter(torch.empty(n_out))
        self.lora_A = nn.Parameter(torch.empty((n_in, rank) if turned else (rank, n_in)))
        self.lora_B = nn.Parameter(torch.empty((rank, n_out) if turned else (n_out, rank)))
        self.turned, self.scale = turned, alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        first, second = (self.lora_A, self.lora_B) if self.turned else (self.lora_A.T, self.lora_B.T)
        return x @ self.weight.T + self.bias + self.scale * (x @ first @ second)


@pytest.mark.parametrize("base_is_the_file", [False, True], ids=["base of its own", "base in the same file"])
@pytest.mark.parametrize("turned", [False, True], ids=["as in the paper", "factors the other way round"])
def test_the_module_of_tutorials_computes_what_it_was_trained_to(
    turned: bool, base_is_the_file: bool, tmp_path: Path
) -> None:
    model = Toy(first=HandWritten(6, 9, 3, ALPHA, turned=turned), second=HandWritten(9, 4, 3, ALPHA, turned=turned))
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    state = {name: t.detach().contiguous() for name, t in model.state_dict().items()}
    weights = {name: t for name, t in state.items() if "lora_" not in name}
    adapter, base = tmp_path / "adapter.safetensors", tmp_path / "base.safetensors"
    save_file(state, adapter)
    save_file(weights, base)
    merge(adapter, adapter if base_is_the_file else base, tmp_path / "out", read=ReadOptions(alpha=ALPHA))

    plain, inputs = Toy(first=nn.Linear(6, 9), second=nn.Linear(9, 4)).double(), {"x": _numbers(5, 6)()}
    plain.load_state_dict(weights)
    before = forward(plain, inputs)
    plain.load_state_dict(tensors_of(tmp_path / "out"), strict=True)
    assert_same_output(forward(plain, inputs), forward(model.double(), inputs), before)
