"""Eight adapters of PEFT 0.6.1, with their bases and the outputs it computed: merged weights compute the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.peer.models import Toy, conv1d
from tests.peer.trained import merge, tensors_of

TOLERANCE = 1e-4
"""PEFT's own for these files: they were computed in float32 on another device."""


class _Reshape(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float().reshape(2, 5, 3, 3)


class _Cast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float()


def _perceptron() -> nn.Module:
    return Toy(cast=_Cast(), lin0=nn.Linear(10, 20), relu=nn.ReLU(), lin1=nn.Linear(20, 2), sm=nn.LogSoftmax(-1))


def _convolution() -> nn.Module:
    head = {"relu": nn.ReLU(), "flat": nn.Flatten(), "lin0": nn.Linear(10, 2), "sm": nn.LogSoftmax(-1)}
    return Toy(reshape=_Reshape(), conv2d=nn.Conv2d(5, 10, 3), **head)


def _embedding_and_conv1d() -> nn.Module:
    head = {"relu": nn.ReLU(), "flat": nn.Flatten(), "lin0": nn.Linear(10, 2), "sm": nn.LogSoftmax(-1)}
    return Toy(emb=nn.Embedding(100, 5), conv1d=conv1d(5, 1), **head)


@dataclass(frozen=True)
class Oracle:
    name: str
    model: Callable[[], nn.Module]
    changed: set[str]


ORACLES = [
    Oracle("lora_mlp", _perceptron, {"lin0.weight"}),
    Oracle("lora_mlp_modules_to_save", _perceptron, {"lin0.weight"}),
    Oracle("lora_conv2d", _convolution, {"conv2d.weight"}),
    Oracle("lora_emb_conv1d", _embedding_and_conv1d, {"emb.weight", "conv1d.weight"}),
    Oracle("adalora_mlp", _perceptron, {"lin0.weight"}),
    Oracle("ia3_mlp", _perceptron, {"lin0.weight"}),
    Oracle("ia3_no_ff_mlp", _perceptron, {"lin0.weight", "lin0.bias"}),
    Oracle("ia3_conv2d", _convolution, {"conv2d.weight"}),
]


@torch.no_grad()
def _output(model: nn.Module, tensors: dict[str, Tensor]) -> Tensor:
    model.load_state_dict(tensors, strict=True)
    return model.eval()(torch.arange(90).reshape(9, 10))


@pytest.mark.parametrize("oracle", ORACLES, ids=lambda oracle: oracle.name)
def test_the_merged_weights_compute_what_peft_0_6_1_computed_without_merging(
    oracle: Oracle, corpus: Path, tmp_path: Path
) -> None:
    folder = corpus / "adapters/huggingface__peft/tests/regression" / oracle.name / "0.6.1"
    base = folder / "base_seed0.safetensors"
    merge(folder, base, tmp_path / "out")
    found, original = tensors_of(tmp_path / "out"), load_file(base)
    expected = torch.load(folder / "output.pt", map_location="cpu", weights_only=True)
    torch.testing.assert_close(_output(oracle.model(), found), expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert {name for name, t in found.items() if not torch.equal(t, original[name])} == oracle.changed
    assert (_output(oracle.model(), original) - expected).abs().max() > 100 * TOLERANCE
