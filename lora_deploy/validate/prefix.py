"""A head on a base that was saved without one: the other tensors then need the prefix of the model with a head.

A base saved from the model's core names its tensors ``encoder.layer.0…``; with a head beside them the loader expects
``bert.encoder.layer.0…``, and would else take the head for a part of the core.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lora_deploy.names.dialects import prefixes_of
from lora_deploy.validate.base import Base
from lora_deploy.validate.placement import Placed


def output_names(placed: Sequence[Placed], added: Sequence[str], base: Base) -> Callable[[str], str]:
    """Give the function from the names used while binding to those of the merged checkpoint."""
    prefix = _needed_prefix(placed, base) if added else ""
    return lambda name: f"{prefix}{name}" if name in base.specs else name


def _needed_prefix(placed: Sequence[Placed], base: Base) -> str:
    for prefix in (f"{name}." for name in prefixes_of(base.config)):
        if any(name.startswith(prefix) for name in base.specs):
            return ""
        if any(item.module_update.target == prefix + item.part.tensor for item in placed):
            return prefix
    return ""
