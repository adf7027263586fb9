"""GRALORA: a low-rank pair for each of k by k blocks, and one for the whole layer in its hybrid form.

Block (j, n) of Δ is the product of q = r / k columns of B's part j and rows of A's part n. All of them together are one
product of rank k·r with zeros in both factors, and the hybrid pair is hybrid_r more: an exact low-rank update.
Source: GraLoRA, arXiv:2505.20355; peft 0.21.2, ``tuners/gralora/layer.py``, ``get_delta_weight``.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch
from pydantic import Field

from lora_deploy.adapter import ModuleUpdate
from lora_deploy.adapters.adapted import Adapted
from lora_deploy.adapters.configuration import Number
from lora_deploy.adapters.tuners.config import TunerConfig
from lora_deploy.adapters.tuners.interface import Reading, Tuner
from lora_deploy.updates.interface import Scale
from lora_deploy.updates.low_rank import LowRank


def read_module(module: Adapted, *, n_parts: int, rank: int, hybrid_rank: int, alpha: float) -> ModuleUpdate:
    """Make the update of one module.

    Raises:
        MalformedAdapterError: Its tensors do not fit each other or the configuration.
    """
    down_parts = module.factor("gralora_A", n_parts, None, rank)
    up_parts = module.factor("gralora_B", n_parts, rank, None)
    if rank % n_parts:
        raise module.malformed(f"r {rank} is no multiple of gralora_k {n_parts}")
    n_in, n_out = down_parts.shape[1], up_parts.shape[2]
    # Column (j, n, q) of the whole product: from A's part n its column j·q + …, into B's part j its row n·q + …
    shape = (n_parts, n_parts, rank // n_parts)
    down = torch.zeros((*shape, n_parts, n_in), dtype=down_parts.dtype)
    up = torch.zeros((n_parts, n_out, *shape), dtype=up_parts.dtype)
    for j in range(n_parts):
        for n in range(n_parts):
            down[j, n, :, n] = down_parts[n].T.reshape(n_parts, -1, n_in)[j]
            up[j, :, j, n] = up_parts[j].reshape(n_parts, -1, n_out)[n].T
    down, up = down.reshape(-1, n_parts * n_in), up.reshape(n_parts * n_out, -1)
    if hybrid_rank:
        down = torch.cat([down, module.factor("gralora_A_general.weight", hybrid_rank, down.shape[1])])
        up = torch.cat([up, module.factor("gralora_B_general.weight", up.shape[0], hybrid_rank)], dim=1)
    told = f"r {rank} + hybrid_r {hybrid_rank}" if hybrid_rank else f"r {rank}"
    scale = Scale(factor=Fraction(alpha) / (rank + hybrid_rank), source=f"alpha {alpha} / ({told})")
    return module.update(LowRank(down=down, up=up, scale=scale))


class GraloraConfig(TunerConfig):
    """Configuration of GRALORA."""

    r: int = Field(default=32, gt=0)
    hybrid_r: int = Field(default=0, ge=0)
    alpha: Number = Field(default=64, allow_inf_nan=False)
    gralora_k: int = Field(default=2, gt=0)


def _read(modules: Sequence[Adapted], config: GraloraConfig) -> Reading:
    def update(module: Adapted) -> ModuleUpdate:
        return read_module(
            module, n_parts=config.gralora_k, rank=config.r, hybrid_rank=config.hybrid_r, alpha=config.alpha
        )

    return Reading(updates=[update(module) for module in modules])


TUNER = Tuner(
    peft_type="GRALORA",
    config=GraloraConfig,
    slots=(("gralora_[AB]", ""), ("gralora_[AB]_general", r"\.weight")),
    read=_read,
)
