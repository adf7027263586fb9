"""Merged linear layers: one weight of n equal parts along its output, some adapted, each by factors of its own.

Source: loralib 0.1.2, ``MergedLinear``; peft 0.2.0 had the same layer (``enable_lora``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_deploy.adapters.interface import AdapterFile
from lora_deploy.errors import MalformedAdapterError


def dense_factors(
    file: AdapterFile, module: str, down: Tensor, up: Tensor, enable_lora: tuple[bool, ...]
) -> tuple[Tensor, Tensor]:
    """Turn stacked factors into plain ones that are zero for the parts that are not adapted.

    Shapes: down (r * n_enabled, in); up (part * n_enabled, r); results (r * n_enabled, in) and
    (part * n_parts, r * n_enabled), where delta_j = up_j @ down_j for the enabled parts j.

    Raises:
        MalformedAdapterError: The factors do not split into the enabled parts.
    """
    n_enabled = sum(enable_lora)
    if not n_enabled or up.shape[0] % n_enabled or down.shape[0] != up.shape[1] * n_enabled:
        enabled = ",".join("T" if part else "F" for part in enable_lora)
        raise MalformedAdapterError(
            f"{file.path}: {module}: A is {tuple(down.shape)}, B is {tuple(up.shape)}: they do not split into the "
            f"enabled parts of {enabled}"
        )
    part, rank = up.shape[0] // n_enabled, up.shape[1]
    dense = torch.zeros(part * len(enable_lora), rank * n_enabled, dtype=up.dtype)
    enabled_parts = [j for j, enabled in enumerate(enable_lora) if enabled]
    for k, j in enumerate(enabled_parts):
        dense[j * part : (j + 1) * part, k * rank : (k + 1) * rank] = up[k * part : (k + 1) * part]
    return down, dense
