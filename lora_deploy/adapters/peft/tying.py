"""``ensure_weight_tying``: PEFT saves one change of a tied matrix twice; here it is applied once.

Source: peft 0.21.2, ``tuners/lora/model.py`` (``tied_adapter``): the output head's factors are the embedding's,
transposed and swapped. PEFT's own merge adds both; the forward pass that trained them applied one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from lora_deploy.adapter import ModuleUpdate
from lora_deploy.updates.low_rank import LowRank


def apply_tied_once(updates: Iterable[ModuleUpdate]) -> tuple[ModuleUpdate, ...]:
    """Drop each linear update whose factors are an embedding's; its keys move to the embedding's update."""
    kept = list(updates)
    for embedding in [update for update in kept if _is_embedding(update)]:
        twin = next((update for update in kept if _is_twin(update, embedding)), None)
        if twin is not None:
            kept[kept.index(embedding)] = replace(embedding, keys=(*embedding.keys, *twin.keys))
            kept.remove(twin)
    return tuple(kept)


def _is_embedding(update: ModuleUpdate) -> bool:
    return isinstance(update.update, LowRank) and any("lora_embedding_A" in key for key in update.keys)


def _is_twin(update: ModuleUpdate, embedding: ModuleUpdate) -> bool:
    """Whether a linear update has the embedding's factors: both are laid out (vocabulary, dim) by now."""
    one, other = update.update, embedding.update
    return (
        update is not embedding
        and not _is_embedding(update)
        and isinstance(one, LowRank)
        and isinstance(other, LowRank)
        and one.scale.factor == other.scale.factor
        and one.scale.root == other.scale.root
        and torch.equal(one.down, other.down)
        and torch.equal(one.up, other.up)
    )
