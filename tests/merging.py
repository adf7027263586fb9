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
from lora_deploy.updates.dora import Dora
from lora_deploy.updates.interface import Update
from lora_deploy.updates.kasa import Kasa
from lora_deploy.updates.low_rank import LowRank
from lora_deploy.updates.residual import Residual
from lora_deploy.updates.token_rows import TokenRows
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
    return tensors, updates


def digests(folder: Path, *patterns: str) -> dict[str, str]:
    """Hash every file below a folder that fits one of the patterns, by its relative path."""
    paths = sorted({path for pattern in patterns or ("*",) for path in folder.rglob(pattern) if path.is_file()})
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
