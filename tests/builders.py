"""Small checkpoints and adapters on disk, for tests of every stage."""

from __future__ import annotations

import json
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_deploy.adapter import Adapter, ModuleUpdate, Orientation
from lora_deploy.checkpoint import Checkpoint, open_checkpoint
from lora_deploy.updates.interface import Scale, Update
from lora_deploy.updates.low_rank import LowRank
from lora_deploy.validate import Binding

Tensors = Mapping[str, Tensor]


def make_checkpoint(
    folder: Path, tensors: Tensors, config: Mapping[str, Any] | None = None, n_shards: int = 1
) -> Checkpoint:
    """Write a safetensors folder, with an index when there is more than one shard, and open it."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(dict(config)))
    contiguous = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    if n_shards == 1:
        save_file(contiguous, folder / "model.safetensors", {"format": "pt"})
        return open_checkpoint(folder)
    weight_map = {}
    for k in range(n_shards):
        file = f"model-{k + 1:05d}-of-{n_shards:05d}.safetensors"
        names = list(contiguous)[k::n_shards]
        save_file({name: contiguous[name] for name in names}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in contiguous.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return open_checkpoint(folder)


def low_rank(out: int, in_: int, rank: int = 2, scale: float = 0.5) -> LowRank:
    """Make a random update of shape (out, in)."""
    return LowRank(down=torch.randn(rank, in_), up=torch.randn(out, rank), scale=make_scale(scale))


def make_scale(value: float = 0.5) -> Scale:
    """Make a scale of exactly this value."""
    return Scale(factor=Fraction(value), source=f"{value} (test)")


def module_update(target: str, update: Any, orientation: Orientation = Orientation.UNKNOWN) -> ModuleUpdate:
    """Make an update whose key names the target."""
    return ModuleUpdate(
        target=target, update=update, orientation=orientation, keys=(f"base_model.model.{target}.lora_A",)
    )


def adapter_of(*updates: ModuleUpdate, **fields: Any) -> Adapter:
    """Make an adapter in memory, as a reader would."""
    defaults: dict[str, Any] = {
        "path": Path("adapter/adapter_model.safetensors"),
        "name": "test",
        "format": "peft",
        "sha256": "0" * 64,
    }
    return Adapter(updates=updates, **(defaults | fields))


def linear_adapter(targets: Mapping[str, tuple[int, int]], **fields: Any) -> Adapter:
    """Make an adapter of random low-rank updates, given (out, in) by target name."""
    return adapter_of(*(module_update(name, low_rank(*shape)) for name, shape in targets.items()), **fields)


def save_peft(folder: Path, tensors: Tensors, config: Mapping[str, Any]) -> Path:
    """Write a PEFT folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "adapter_model.safetensors")
    defaults = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": []}
    (folder / "adapter_config.json").write_text(json.dumps(defaults | dict(config)))
    return folder


def merged_values(binding: Binding) -> dict[str, Tensor]:
    """Evaluate a binding the plain way: every output in float64, each update's ``block`` over its whole region."""
    checkpoint = binding.checkpoint
    merged = {}
    for name, source in binding.outputs.items():
        updates = binding.updates.get(name, ())
        shape = binding.shapes.get(name)
        if shape is not None:
            weight = torch.full(shape, torch.nan, dtype=torch.float64)
        else:
            assert source is not None, f"{name} starts from nothing"
            spec = checkpoint.tensors[source]
            raw = torch.frombuffer(bytearray(checkpoint.read(source)), dtype=getattr(torch, spec.dtype.long_name))
            weight = raw.reshape(spec.shape).to(torch.float64)
        flat = weight.reshape(-1)
        for bound in updates:
            region, update = bound.region, bound.update
            assert region is not None
            assert isinstance(update, Update)
            rows = flat[region.offset : region.stop].reshape(region.n_rows, region.n_cols)
            state = update.prepare(lambda part, rows=rows: rows[part])  # type: ignore[misc]
            flat[region.offset : region.stop] = update.block(rows, slice(0, region.n_rows), state).reshape(-1)
        merged[name] = flat.reshape(weight.shape)
    return merged
