"""Merges made by hand, for tests of the stages from the plan on: no adapter file, no names to resolve."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_deploy.adapter import ModuleUpdate, Orientation
from lora_deploy.checkpoint import Checkpoint, open_checkpoint
from lora_deploy.merge.options import MergeOptions
from lora_deploy.merge.plan import MergePlan, plan_merge
from lora_deploy.tensors import Region
from lora_deploy.updates.addition import Addition
from lora_deploy.updates.block_affine import BlockAffine
from lora_deploy.updates.circulant import Circulant
from lora_deploy.updates.dora import Dora
from lora_deploy.updates.hadamard import Hadamard, Pair
from lora_deploy.updates.interface import Update
from lora_deploy.updates.joint import Joint
from lora_deploy.updates.kasa import Kasa
from lora_deploy.updates.kronecker import Kronecker
from lora_deploy.updates.low_rank import LowRank
from lora_deploy.updates.modulation import Modulation
from lora_deploy.updates.principal import Principal, Randomised
from lora_deploy.updates.random_bases import RandomBases
from lora_deploy.updates.rescaling import Rescaling
from lora_deploy.updates.residual import Residual
from lora_deploy.updates.rotation import Blocks, Reflections, Rotation
from lora_deploy.updates.scaled_product import ScaledProduct
from lora_deploy.updates.sparse import Sparse
from lora_deploy.updates.spectral import Spectral
from lora_deploy.updates.subspace import Subspace
from lora_deploy.updates.token_rows import TokenRows
from lora_deploy.updates.weight_network import WeightNetwork
from lora_deploy.validate import Binding
from tests.builders import adapter_of, low_rank, make_checkpoint, make_scale

Placed = Update | tuple[Update, Region]
LLAMA = {"model_type": "llama", "dtype": "bfloat16", "hidden_size": 64}


def binding_of(
    checkpoint: Checkpoint, updates: Mapping[str, Sequence[Placed] | Placed], *, sha256: str = "0" * 64, **fields: Any
) -> Binding:
    """Bind updates to tensors by name, as if every question had been answered; those not in the base are added."""
    bound: dict[str, tuple[ModuleUpdate, ...]] = {}
    for name, given in updates.items():
        several = given if isinstance(given, list) else [given]
        placed = [item if isinstance(item, tuple) else (item, None) for item in several]
        bound[name] = tuple(
            ModuleUpdate(
                target=name, update=update, orientation=Orientation.STORED, region=region, keys=(f"{name}.key",)
            )
            for update, region in placed
        )
    outputs = {name: name for name in checkpoint.tensors} | {
        name: None for name in updates if name not in checkpoint.tensors
    }
    adapter = adapter_of(*(entry for entries in bound.values() for entry in entries), sha256=sha256)
    answers: dict[str, Any] = {"outputs": outputs, "updates": bound}
    return Binding(checkpoint=checkpoint, adapters=(adapter,), **(answers | fields))


def model_tensors(n_layers: int = 4, width: int = 64, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Make the weights of a small model: two matrices and a norm a layer, an embedding, and a counter."""
    tensors = {"model.embed_tokens.weight": torch.randn(96, width).to(dtype)}
    for k in range(n_layers):
        tensors[f"model.layers.{k}.up_proj.weight"] = (torch.randn(2 * width, width) * 0.05).to(dtype)
        tensors[f"model.layers.{k}.down_proj.weight"] = (torch.randn(width, 2 * width) * 0.05).to(dtype)
        tensors[f"model.layers.{k}.norm.weight"] = torch.randn(width).to(dtype)
    return tensors | {"model.counter": torch.arange(7)}


def model_updates(n_layers: int = 4, width: int = 64) -> dict[str, Placed]:
    """Make a low-rank update for every matrix of such a model."""
    updates: dict[str, Placed] = {}
    for k in range(n_layers):
        updates[f"model.layers.{k}.up_proj.weight"] = low_rank(2 * width, width, scale=0.02)
        updates[f"model.layers.{k}.down_proj.weight"] = low_rank(width, 2 * width, scale=0.02)
    return updates


def model_plan(folder: Path, *, seed: int = 0, n_layers: int = 4, width: int = 64, **options: Any) -> MergePlan:
    """Plan the merge of a small model, always the same for a seed; its base is written on the first call."""
    torch.manual_seed(seed)
    tensors, base = model_tensors(n_layers, width), folder / f"base-{seed}-{n_layers}-{width}"
    checkpoint = open_checkpoint(base) if base.exists() else make_checkpoint(base, tensors, LLAMA)
    binding = binding_of(checkpoint, model_updates(n_layers, width), sha256=f"{seed:064}")
    defaults: dict[str, Any] = {"max_shard_bytes": 40_000, "n_workers": 2, "device": "cpu"}
    return plan_merge(binding, MergeOptions(**(defaults | options)))


def _factors_of(out: int, in_: int, rank: int, dtype: torch.dtype) -> LowRank:
    up, down = torch.randn(out, rank) * 0.05, torch.randn(rank, in_) * 0.05
    return LowRank(up=up.to(dtype), down=down.to(dtype), scale=make_scale(0.7))


def every_kind() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Make tensors of odd shapes and every kind of update on them; ties are planted in the first."""
    tensors = {
        "ties": (torch.randint(-8, 9, (700, 300)) * 2.0**-7).to(torch.bfloat16),
        "plain": torch.randn(1031, 517).to(torch.bfloat16) * 0.1,
        "wide": torch.randn(3, 5001).to(torch.bfloat16) * 0.1,
        "wider base": torch.randn(300, 200) * 0.1,
        "stack": torch.randn(4, 60, 50).to(torch.bfloat16) * 0.1,
        "rows": torch.randn(800, 64).to(torch.bfloat16),
        "dora": torch.randn(1500, 700).to(torch.bfloat16) * 0.1,
        "dora columns": torch.randn(2100, 300).to(torch.bfloat16) * 0.1,
        "residual": torch.randn(120, 90) * 0.1,
        "kasa": torch.randn(60, 80) * 0.1,
        "bias": torch.randn(900),
        "scaled product": torch.randn(1100, 1000).to(torch.bfloat16) * 0.1,
        "random bases": torch.randn(60, 90) * 0.1,
        "block affine": torch.randn(1200, 900).to(torch.bfloat16) * 0.1,
        "circulant": torch.randn(1500, 800) * 0.1,
        "spectral": torch.randn(700, 1601) * 0.1,
        "sparse": torch.randn(1300, 900).to(torch.bfloat16) * 0.1,
        "subspace": torch.randn(2100, 600) * 0.1,
        "subspace turned": torch.randn(600, 2100) * 0.1,
        "principal": torch.randn(90, 70) * 0.1,
        "joint": torch.randn(2100, 60) * 0.1,
        "network": torch.randn(2100, 600) * 0.1,
        "hadamard": torch.randn(1300, 800).to(torch.bfloat16) * 0.1,
        "kronecker": torch.randn(1200, 810) * 0.1,
        "rescaling": torch.randn(1300, 700).to(torch.bfloat16),
        "modulation": torch.randn(1300, 700).to(torch.bfloat16),
        "rotated inputs": torch.randn(1500, 640).to(torch.bfloat16),
        "rotated outputs": torch.randn(640, 1100),
        "reflected": torch.randn(1500, 600).to(torch.bfloat16),
        "cast": torch.randn(333, 77),
        "copied": torch.arange(1000),
    }
    ties = LowRank(
        up=(torch.randint(-1, 2, (700, 2)) * 2.0**-8).half(),
        down=torch.randint(-3, 4, (2, 300)).half(),
        scale=make_scale(0.5),
    )
    updates: dict[str, Any] = {
        "ties": ties,
        "plain": [_factors_of(1031, 517, 16, torch.float16), _factors_of(1031, 517, 3, torch.float32)],
        "wide": _factors_of(3, 5001, 8, torch.float32),
        "wider base": _factors_of(300, 200, 8, torch.bfloat16),
        "stack": (_factors_of(60, 50, 4, torch.float32), Region(offset=2 * 3000, n_rows=60, n_cols=50)),
        "rows": [
            TokenRows(indices=(5, 700), values=torch.randn(2, 64), n_rows=800),
            _factors_of(800, 64, 4, torch.float32),
        ],
        "dora": Dora(inner=_factors_of(1500, 700, 8, torch.float32), magnitude=torch.rand(1500) + 0.5, axis="rows"),
        "dora columns": Dora(
            inner=_factors_of(2100, 300, 8, torch.float32), magnitude=torch.rand(300) + 0.5, axis="columns"
        ),
        "residual": Residual(low_rank=_factors_of(120, 90, 4, torch.float32), method="pissa"),
        "kasa": Kasa(low_rank=_factors_of(60, 80, 4, torch.float32)),
        "bias": Addition(values=torch.randn(900), scale=make_scale(0.3)),
    }
    return tensors, updates | _kinds_of_other_tuners() | _kinds_that_multiply()


def _kinds_that_multiply() -> dict[str, Any]:
    first, second = (
        Pair(up=torch.randn(1300, 4) * 0.1, down=torch.randn(4, 800) * 0.1),
        Pair(up=torch.randn(1300, 3), down=torch.randn(3, 800)),
    )
    blocks = Blocks(blocks=torch.randn(20, 32, 32, dtype=torch.float64) * 0.2, n_blocks=20, order=torch.randperm(640))
    normals = torch.randn(600, 5, dtype=torch.float64)
    mirrors = Reflections(normals=normals / torch.linalg.vector_norm(normals, dim=0))
    return {
        "hadamard": Hadamard(first=first, second=second, scale=make_scale(0.5)),
        "kronecker": Kronecker(left=torch.randn(30, 9), right=torch.randn(40, 90) * 0.1, scale=make_scale(0.5)),
        "rescaling": Rescaling(factors=torch.rand(1300) + 0.5, axis="rows", n_other=700),
        "modulation": Modulation(pair=Pair(up=torch.randn(1300, 3) * 0.1, down=torch.randn(3, 700))),
        "rotated inputs": Rotation(turns=(blocks, blocks), axis="columns", n_other=1500, lengths=torch.rand(1500)),
        "rotated outputs": Rotation(turns=(blocks,), axis="rows", n_other=1100),
        "reflected": Rotation(turns=(mirrors,), axis="columns", n_other=1500),
    }


def _kinds_of_other_tuners() -> dict[str, Any]:
    half = make_scale(0.5)
    places = torch.randperm(700 * 1601)[:300]
    directions = torch.randn(2100, 4) * 0.1
    subspace = Subspace(directions=directions, method="relu", injected=torch.randn(4, 600) * 0.1, scale=half, n_in=600)
    return {
        "scaled product": ScaledProduct(
            up=torch.randn(1200, 16)[:1100],
            down=torch.randn(16, 1300)[:, :1000],
            inner=torch.randn(16) * 0.1,
            row=torch.randn(1100),
            scale=half,
        ),
        "random bases": RandomBases(
            shared_up=torch.randn(90, 15, 4),
            shared_down=torch.randn(4, 60),
            sizes=torch.randn(4, 15) * 0.01,
            widths=torch.randn(15, 60),
            is_turned=True,
            scale=half,
        ),
        "block affine": BlockAffine(blocks=torch.randn(20, 60, 60) * 0.01, n_cols=900, scale=half),
        "circulant": Circulant(kernel=torch.randn(15, 8, 100) * 0.1, scale=half),
        "spectral": Spectral(
            rows_of=places // 1601,
            columns_of=places % 1601,
            coefficients=torch.randn(300) * 99,
            n_rows=700,
            n_cols=1601,
            scale=half,
        ),
        "sparse": Sparse.at(
            torch.randint(0, 1300, (5000,)), torch.randint(0, 900, (5000,)), torch.randn(5000), (1300, 900), half
        ),
        "subspace": subspace,
        "subspace turned": subspace.transposed(),
        "principal": Principal(
            rotation=torch.randn(5, 5, dtype=torch.float64),
            is_split=True,
            randomised=Randomised(n_iterations=2, seed=1),
            n_rows=90,
            n_cols=70,
        ),
        "joint": Joint(
            basis=torch.randn(60, 60),
            diagonal=torch.randn(60),
            row=torch.randint(0, 60, (40,)),
            column=torch.randint(0, 60, (40,)),
            entries=torch.randn(40),
            n_out=2100,
        ),
        "network": WeightNetwork(
            first=torch.randn(4, 2100) * 0.1,
            encoders=(torch.randn(4, 4),),
            decoders=(torch.randn(4, 4),),
            last=torch.randn(2100, 4) * 0.1,
            activation="gelu",
            scale=half,
            n_cols=600,
        ),
    }


def digests(folder: Path, *patterns: str) -> dict[str, str]:
    """Hash every file below a folder that fits one of the patterns, by its relative path."""
    paths = sorted({path for pattern in patterns or ("*",) for path in folder.rglob(pattern) if path.is_file()})
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
