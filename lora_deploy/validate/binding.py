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
    tokenizer: str | None = None
    """``adapter`` or ``base``: whose tokenizer is to travel; its token ids must have rows in the embedding."""
    components: tuple[str, ...] = ()
    """Components of a diffusion pipeline that adapters go to: one for all, or one an adapter, in order; empty means
    the only one that fits."""
    variant: str | None = None
    """Which weights of a diffusion pipeline are the base where it has several, such as ``fp16``."""
    into_language_model: bool = False
    """Whether the names of a text model mean the language model of a base that holds more than that."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Binding:
    """Adapters that fit a base, every question answered."""

    checkpoint: Checkpoint
    adapters: tuple[Adapter, ...]
    outputs: Mapping[str, str | None]
    """Every tensor of the merged checkpoint in order, and the base tensor it starts from; None: the adapter adds it.
    Names differ from the base's where layers are replicated or a head makes the base model's prefix necessary; two
    outputs may start from one base tensor (layers replicated, embeddings untied)."""
    updates: Mapping[str, tuple[ModuleUpdate, ...]]
    """Changed tensors of ``outputs``, each with its updates in the order they apply. Every update is laid out as stored
    and has its region; the regions of one tensor are equal or disjoint. Within a region
    replacements come first."""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Shapes of the outputs that do not have the shape of the base tensor they start from."""
    config_edits: Mapping[str, Any] = field(default_factory=dict)
    """Keys of ``config.json`` to set (dotted for nested ones), such as ``tie_word_embeddings``."""
    excluded: tuple[str, ...] = ()
    """Adapter keys left out because ``include`` or ``exclude`` said so."""
    findings: tuple[Finding, ...] = ()
    """Notes and warnings; errors raise instead."""
    options: BindOptions = BindOptions()
