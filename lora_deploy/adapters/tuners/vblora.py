"""VBLORA: factors put together from a bank of vectors that all layers share.

Each sub-vector of A and of B is a mixture of the bank's vectors: the ``topk`` largest logits, softmax over them. With
``save_only_topk_weights`` the file holds which these were and all but the last of the weights, which sum to 1.

Definition: softmax, mixtures and thereby A and B in float64; their product is then a low-rank update like any other.
Source: VB-LoRA, arXiv:2405.15179; peft 0.21.2, ``tuners/vblora/layer.py``, ``_get_lora_matrices``, and ``model.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch
from pydantic import Field
from torch import Tensor

from lora_deploy.adapter import ModuleUpdate
from lora_deploy.adapters.adapted import Adapted
from lora_deploy.adapters.tuners.config import TunerConfig
from lora_deploy.adapters.tuners.interface import Reading, Tuner
from lora_deploy.updates.interface import Scale
from lora_deploy.updates.low_rank import LowRank

_UNSCALED = Scale(factor=Fraction(1), source="VB-LoRA has no scale")


def read_module(module: Adapted, *, top_k: int) -> ModuleUpdate:
    """Make the update of one module.

    Raises:
        MalformedAdapterError: Logits and bank do not fit each other.
    """
    bank = module.factor("vblora_vector_bank", None, None).to(torch.float64)
    down = _mixtures(module, "vblora_logits_A", bank, top_k)  # (r, in / L, L)
    up = _mixtures(module, "vblora_logits_B", bank, top_k)  # (out / L, r, L)
    if down.shape[0] != up.shape[1]:
        raise module.malformed(f"logits of A are of rank {down.shape[0]}, those of B of rank {up.shape[1]}")
    update = LowRank(down=down.flatten(1), up=up.transpose(1, 2).reshape(-1, up.shape[1]), scale=_UNSCALED)
    return module.update(update)


def _mixtures(module: Adapted, slot: str, bank: Tensor, top_k: int) -> Tensor:
    """Mix the bank's vectors for each row of logits: (a, b, L) float64."""
    if slot in module.slots:
        logits, chosen = module.factor(slot, None, None, len(bank)).topk(min(top_k, len(bank)), dim=-1)
        weights = torch.softmax(logits.to(torch.float64), dim=-1)
    else:
        chosen = module.integers(f"{slot}_topk_indices", None, None, top_k, below=len(bank))
        if top_k == 1:
            weights = torch.ones(chosen.shape, dtype=torch.float64)
        else:
            given = module.factor(f"{slot}_topk_weights", *chosen.shape[:2], top_k - 1).to(torch.float64)
            weights = torch.cat([given, (1 - given.sum(-1, keepdim=True)).clamp(min=0)], dim=-1)
    return (weights[..., None] * bank[chosen]).sum(-2)


class VbloraConfig(TunerConfig):
    """Configuration of VBLORA."""

    r: int = Field(default=4, gt=0)
    num_vectors: int = Field(default=256, gt=0)
    vector_length: int = Field(default=256, gt=0)
    topk: int = Field(default=2, gt=0)
    save_only_topk_weights: bool = False
    init_vector_bank_bound: float | None = None
    init_logits_std: float | None = None


def _read(modules: Sequence[Adapted], config: VbloraConfig) -> Reading:
    modules[0].factor("vblora_vector_bank", config.num_vectors, config.vector_length)
    return Reading(updates=[read_module(module, top_k=config.topk) for module in modules])


TUNER = Tuner(
    peft_type="VBLORA",
    config=VbloraConfig,
    slots=(("vblora_logits_[AB]", ""), ("vblora_logits_[AB]_topk_(indices|weights)", "")),
    shared=(("vblora_vector_bank", ""),),
    read=_read,
)
