"""Tuners whose differences are made of shared, sparse, spectral or weight-dependent parts, against PEFT 0.21.2."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftConfig
from torch import nn

from tests.peer.models import conv1d, toy
from tests.peer.trained import Trained, assert_merges_as_trained, peft_advice_unheard, train

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")
IN_FLOAT32 = 2e-6
"""What the peer computes in float32 (transforms, projections, factorisations), relative to the largest weight."""


@dataclass(frozen=True)
class Case:
    name: str
    config: Callable[[], PeftConfig]
    noise: float = 0
    has_conv1d: bool = False


def _config(kind: str, **options: Any) -> Callable[[], PeftConfig]:
    def make() -> PeftConfig:
        with peft_advice_unheard():
            return getattr(peft, f"{kind}Config")(target_modules=["a", "b", "c"], **options)

    return make


CASES = [
    Case("VERA", _config("Vera", r=3), has_conv1d=True),
    Case(
        "VERA without its projections",
        _config("Vera", r=3, save_projection=False, projection_prng_key=7),
        has_conv1d=True,
    ),
    Case("PVERA", _config("Pvera", r=3), has_conv1d=True),
    Case("PVERA without its projections", _config("Pvera", r=3, save_projection=False), has_conv1d=True),
    Case("RANDLORA", _config("RandLora", r=3), has_conv1d=True),
    Case("RANDLORA, sparse", _config("RandLora", r=2, sparse=True, randlora_alpha=5), has_conv1d=True),
    Case("MISS", _config("Miss", r=3)),
    Case("MISS mini", _config("Miss", r=3, init_weights="mini", mini_r=2)),
    Case("MISS bat", _config("Miss", r=2, init_weights="bat")),
    Case("C3A", _config("C3A", block_size=2), noise=IN_FLOAT32),
    Case("C3A with a pattern", _config("C3A", block_size=2, block_size_pattern={"c": 3}), noise=IN_FLOAT32),
    Case(
        "FOURIERFT",
        _config("FourierFT", n_frequency=7, n_frequency_pattern={"c": 5}),
        noise=IN_FLOAT32,
        has_conv1d=True,
    ),
    Case("WAVEFT", _config("WaveFT", n_frequency=9, scaling=3.5), has_conv1d=True),
    Case("WAVEFT, proportional", _config("WaveFT", n_frequency=9, proportional_parameters=True)),
    Case(
        "WAVEFT without transform", _config("WaveFT", n_frequency=9, use_idwt=False, random_loc_seed=3), has_conv1d=True
    ),
    Case("VBLORA", _config("VBLoRA", r=3, num_vectors=7, vector_length=2, topk=3), has_conv1d=True),
    Case(
        "VBLORA, topk only",
        _config("VBLoRA", r=3, num_vectors=7, vector_length=2, topk=3, save_only_topk_weights=True),
        noise=IN_FLOAT32,
    ),
    Case(
        "VBLORA, topk of one",
        _config("VBLoRA", r=3, num_vectors=7, vector_length=2, topk=1, save_only_topk_weights=True),
        noise=IN_FLOAT32,
    ),
    Case("DELORA", _config("Delora", r=3, rank_pattern={"c": 2}, lambda_pattern={"a": 3.0})),
    Case("GRALORA", _config("Gralora", r=4, gralora_k=2, alpha=5), has_conv1d=True),
    Case("GRALORA, hybrid", _config("Gralora", r=4, gralora_k=2, hybrid_r=3), has_conv1d=True),
    Case("SHIRA", _config("Shira", r=1)),
    Case("SUPERTUNING", _config("Supertuning", sparsity=0.6)),
    Case("SUPERTUNING, hybrid", _config("Supertuning", sparsity=0.6, r=2, lora_alpha=5, select_top=False)),
    Case("TINYLORA", _config("TinyLora", r=2, u=3), has_conv1d=True),
    Case("TINYLORA, tied in pairs", _config("TinyLora", r=2, u=3, weight_tying=0.5), has_conv1d=True),
    Case("TINYLORA, one for all", _config("TinyLora", r=2, u=3, weight_tying=1.0), has_conv1d=True),
    Case("UNILORA with its indices", _config("UniLora", r=2, theta_d_length=11, save_indices=True), has_conv1d=True),
    Case("DEFT", _config("Deft", r=3), noise=IN_FLOAT32, has_conv1d=True),
    Case(
        "DEFT, qr and alpha",
        _config("Deft", r=3, decomposition_method="qr", alpha=5),
        noise=IN_FLOAT32,
        has_conv1d=True,
    ),
    Case("DEFT, para", _config("Deft", r=2, para=True), noise=IN_FLOAT32, has_conv1d=True),
    Case("FROD", _config("Frod", sparse_rate=0.1, progressbar=False), noise=10 * IN_FLOAT32, has_conv1d=True),
    Case("OSF", _config("OSF"), noise=IN_FLOAT32),
    Case("OSF with a pattern", _config("OSF", effective_rank=0.7, rank_pattern={"c": 2}), noise=IN_FLOAT32),
    Case("PSOFT", _config("Psoft", r=3), noise=IN_FLOAT32),
    Case(
        "PSOFT, pissa_init",
        _config("Psoft", r=3, ab_svd_init="pissa_init", psoft_alpha=5, psoft_mag_a=False),
        noise=IN_FLOAT32,
    ),
    Case(
        "PSOFT, Neumann",
        _config("Psoft", r=3, use_cayley_neumann=True, cayley_neumann_eps=0.2, psoft_mag_b=False),
        noise=IN_FLOAT32,
    ),
    Case(
        "PSOFT, three terms",
        _config("Psoft", r=3, use_cayley_neumann=True, num_cayley_neumann_terms=3),
        noise=IN_FLOAT32,
    ),
    Case(
        "PSOFT, not orthogonal, randomised",
        _config("Psoft", r=3, psoft_orth=False, psoft_svd="lowrank", random_seed=5),
        noise=IN_FLOAT32,
    ),
    Case("PEANUT", _config("Peanut", r=3, scaling=0.7)),
    Case("PEANUT, deep", _config("Peanut", r=3, depth=2, act_fn="gelu")),
]


def layers(*, first: nn.Module) -> nn.Module:
    """Three layers that are wide, high and square; b and c divide by 2 and 3."""
    return toy(a=first, b=nn.Linear(4, 6), c=nn.Linear(6, 6))


def trained_by(case: Case, folder: Path, *, is_conv1d: bool = False) -> Trained:
    first = conv1d(8, 4) if is_conv1d else nn.Linear(8, 4)
    return train(layers(first=first), case.config(), folder)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_layers_merge_to_what_peft_0_21_2_merges(case: Case, tmp_path: Path) -> None:
    trained = trained_by(case, tmp_path)
    inputs = {"x": torch.randn(5, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)}
    assert_merges_as_trained(trained, inputs, tmp_path / "out", noise=case.noise)


@pytest.mark.parametrize("case", [case for case in CASES if case.has_conv1d], ids=lambda case: case.name)
def test_a_layer_stored_as_in_out_merges_to_what_peft_0_21_2_merges(case: Case, tmp_path: Path) -> None:
    trained = train(toy(a=conv1d(8, 4), b=conv1d(4, 6), c=conv1d(6, 6)), case.config(), tmp_path)
    inputs = {"x": torch.randn(5, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)}
    assert_merges_as_trained(trained, inputs, tmp_path / "out", noise=case.noise)
