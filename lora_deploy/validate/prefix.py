"""A head on a base that was saved without one: the other tensors then need the prefix of the model with a head.

A base saved from the model's core names its tensors ``encoder.layer.0…``; with a head beside them the loader expects
``bert.encoder.layer.0…``, and would else take the head for a part of the core.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lora_deploy.adapter import ModuleUpdate
from lora_deploy.names.dialects import prefixes_of
from lora_deploy.validate.base import Base
from lora_deploy.validate.placement import Placed

Outputs = dict[str, str | None]
Updates = dict[str, tuple[ModuleUpdate, ...]]


def with_prefix(
    outputs: Outputs, updates: Updates, placed: Sequence[Placed], added: Sequence[str], base: Base
) -> tuple[Outputs, Updates]:
    """Rename the outputs that come from a base without prefix, if a head was added that needs it."""
    prefix = _needed_prefix(placed, base) if added else ""
    if not prefix:
        return outputs, updates

    def renamed(name: str) -> str:
        return f"{prefix}{name}" if name in base.specs else name

    return (
        {renamed(name): source for name, source in outputs.items()},
        {renamed(n): tuple(replace(u, target=renamed(n)) for u in group) for n, group in updates.items()},
    )


def _needed_prefix(placed: Sequence[Placed], base: Base) -> str:
    for prefix in (f"{name}." for name in prefixes_of(base.config)):
        if any(name.startswith(prefix) for name in base.specs):
            return ""
        if any(item.module_update.target == prefix + item.part.tensor for item in placed):
            return prefix
    return ""
