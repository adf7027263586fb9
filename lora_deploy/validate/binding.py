"""What binding gives: the proof that adapters fit a base, with every question answered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_deploy.adapter import Adapter, ModuleUpdate
from lora_deploy.checkpoint import Checkpoint
from lora_deploy.errors import Finding


@dataclass(frozen=True, slots=True, kw_only=True)
class BindOptions:
    """What the user may choose when adapters meet a base."""

    weights: tuple[float, ...] = ()
    """One factor an adapter, in order; empty means 1 for all."""
    include: tuple[str, ...] = ()
    """Shell patterns of tensor names that may be changed; empty means all."""
    exclude: tuple[str, ...] = ()
    """Shell patterns of tensor names that must not be changed; named in the record."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Binding:
    """Adapters that fit a base, every question answered."""

    checkpoint: Checkpoint
    adapters: tuple[Adapter, ...]
    outputs: Mapping[str, str | None]
    """Every tensor of the merged checkpoint in order, and the base tensor it starts from; None: the adapter adds it."""
    updates: Mapping[str, tuple[ModuleUpdate, ...]]
    """Changed tensors of ``outputs``, each with its updates in the order they apply; every region is set, every update is
    laid out as stored."""
    config_edits: Mapping[str, Any] = field(default_factory=dict)
    """Keys of ``config.json`` to set (dotted for nested ones), such as ``tie_word_embeddings``."""
    excluded: tuple[str, ...] = ()
    """Adapter keys left out because the user said so."""
    findings: tuple[Finding, ...] = ()
    """Notes and warnings; errors raise instead."""
    options: BindOptions = BindOptions()
