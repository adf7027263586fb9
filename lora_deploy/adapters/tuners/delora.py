"""DELORA: rank-one parts of unit length, scaled together, and by the lengths of the base's columns, which are saved.

``Δ = B·diag(λ / (r·‖A_j‖·‖B_:j‖))·A·diag(w)``; lengths below 1e-4 count as 1e-4.
Definition: lengths and the diagonal in float64.
Source: DeLoRA, arXiv:2503.18225; peft 0.21.2, ``tuners/delora/layer.py``, ``_compute_delta``.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch

from lora_deploy.adapter import ModuleUpdate
from lora_deploy.adapters.adapted import Adapted
from lora_deploy.adapters.tuners.config import TunerConfig
from lora_deploy.adapters.tuners.interface import Reading, Tuner
from lora_deploy.updates.interface import Scale
from lora_deploy.updates.scaled_product import ScaledProduct

_SHORTEST = 1e-4


def read_module(module: Adapted) -> ModuleUpdate:
    """Make the update of one module.

    Raises:
        MalformedAdapterError: Its tensors do not fit each other.
    """
    down = module.factor("delora_A", None, None)
    rank = down.shape[0]
    up = module.factor("delora_B", None, rank)
    bound = module.factor("delora_lambda", 1).to(torch.float64)
    column = module.factor("delora_w_norm", down.shape[1])
    lengths = torch.linalg.vector_norm(down.to(torch.float64), dim=1).clamp(min=_SHORTEST)
    lengths = lengths * torch.linalg.vector_norm(up.to(torch.float64), dim=0).clamp(min=_SHORTEST)
    scale = Scale(factor=Fraction(1, rank), source=f"1 / r {rank}; λ is trained")
    return module.update(ScaledProduct(up=up, down=down, inner=bound / lengths, column=column, scale=scale))


class DeloraConfig(TunerConfig):
    """Configuration of DELORA; rank and bound of a module are those of its tensors."""

    r: int = 8
    delora_lambda: float | None = None
    rank_pattern: dict[str, int] | None = None
    lambda_pattern: dict[str, float] | None = None


def _read(modules: Sequence[Adapted], config: DeloraConfig) -> Reading:
    del config
    return Reading(updates=[read_module(module) for module in modules])


TUNER = Tuner(peft_type="DELORA", config=DeloraConfig, slots=(("delora_(A|B|lambda|w_norm)", ""),), read=_read)
