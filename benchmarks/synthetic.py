"""Write a random bfloat16 base and a random rank-16 PEFT adapter of a given shape; made once and kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from shapes import Shape

RANK = 16
ALPHA = 32
_POOL_ELEMENTS = 1 << 26


def make_base(folder: Path, shape: Shape) -> Path:
    """Write the base, sharded with an index; weights are N(0, 0.02²)."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    pool = torch.randn(_POOL_ELEMENTS, generator=torch.Generator().manual_seed(0)) * 0.02
    pool = pool.to(getattr(torch, shape.dtype))
    total = sum(pool.itemsize * torch.Size(size).numel() for _, size in shape.tensors())
    weight_map: dict[str, str] = {}
    for number, group in enumerate(_groups(shape, total / shape.n_shards, pool.itemsize), start=1):
        file = f"model-{number:05d}-of-{shape.n_shards:05d}.safetensors"
        save_file({name: _cut(pool, size, len(name)) for name, size in group}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys((name for name, _ in group), file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(shape.config()))
    return folder


def _groups(shape: Shape, n_bytes: float, itemsize: int) -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    group: list[tuple[str, tuple[int, ...]]] = []
    done, emitted = 0, 0
    for name, size in shape.tensors():
        group.append((name, size))
        done += itemsize * torch.Size(size).numel()
        if done >= n_bytes * (emitted + 1) and emitted < shape.n_shards - 1:
            yield group
            group, emitted = [], emitted + 1
    yield group


def _cut(pool: torch.Tensor, size: tuple[int, ...], offset: int) -> torch.Tensor:
    n_elements = torch.Size(size).numel()
    repeats = -(-(n_elements + offset) // pool.numel())
    return pool.repeat(repeats)[offset : offset + n_elements].reshape(size).clone()


def make_adapter(folder: Path, shape: Shape) -> Path:
    """Write the adapter: rank 16 on all seven projections, both factors random, float32 as trainers save it."""
    if (folder / "adapter_config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for layer in range(shape.n_layers):
        for path, (out, in_) in shape.projections().items():
            prefix = f"base_model.model.model.layers.{layer}.{path}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, in_, generator=generator) * 0.02
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(out, RANK, generator=generator) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": sorted({path.rpartition(".")[2] for path in shape.projections()}),
        "base_model_name_or_path": "benchmark",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of one word: exporters insist on loading one."""
    model = {"type": "WordLevel", "vocab": {"x": 0}, "unk_token": "x"}
    parts = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model, **parts}))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "x"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
