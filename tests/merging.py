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
from lora_deploy.updates.interface import Update
from lora_deploy.validate import Binding
from tests.builders import adapter_of, low_rank, make_checkpoint

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


def digests(folder: Path, *patterns: str) -> dict[str, str]:
    """Hash every file below a folder that fits one of the patterns, by its relative path."""
    paths = sorted({path for pattern in patterns or ("*",) for path in folder.rglob(pattern) if path.is_file()})
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
