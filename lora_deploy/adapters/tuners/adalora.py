"""ADALORA: singular vectors and values of a difference: ``Δ = alpha / (init_r + 1e-5)·B·(A ⊙ E)``.

The divisor is the configuration's ``init_r``, whatever rank was left when training had pruned it. The file holds what
is left; ``rank_pattern`` only tells which of the first ranks that was. E is folded into B, exactly, in float64.
Source: AdaLoRA, arXiv:2303.10512; peft 0.21.2, ``tuners/adalora/layer.py``, ``get_delta_weight``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import torch
from pydantic import Field

from lora_deploy.adapter import ModuleUpdate
from lora_deploy.adapters.adapted import Adapted
from lora_deploy.adapters.configuration import Number
from lora_deploy.adapters.tuners.config import TunerConfig
from lora_deploy.adapters.tuners.interface import Reading, Tuner
from lora_deploy.errors import UnmergeableAdapterError
from lora_deploy.updates.interface import Scale
from lora_deploy.updates.low_rank import LowRank

_EPSILON = Fraction("1e-5")


class AdaLoraConfig(TunerConfig):
    """Configuration of ADALORA: LORA's, of which it uses only alpha."""

    init_r: int = Field(default=12, gt=0)
    lora_alpha: Number = Field(default=8, allow_inf_nan=False)
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False

    # No effect on the merged values, or none that the tensors do not show.
    r: Any = None
    target_r: Any = None
    tinit: Any = None
    tfinal: Any = None
    deltaT: Any = None  # noqa: N815 - PEFT's name
    beta1: Any = None
    beta2: Any = None
    orth_reg_weight: Any = None
    total_step: Any = None
    rank_pattern: Any = None
    alpha_pattern: Any = None
    init_lora_weights: Any = None
    loftq_config: Any = None
    megatron_config: Any = None
    megatron_core: Any = None
    qalora_group_size: Any = None


def read_module(module: Adapted, config: AdaLoraConfig) -> Iterator[ModuleUpdate]:
    """Make the update of one module; one that was pruned away altogether changes nothing.

    Raises:
        MalformedAdapterError: Its tensors do not fit each other.
    """
    stored = module.file.tensors[module.slots.get("lora_A", next(iter(module.slots.values())))]
    rank = int(stored.shape[0])
    if not rank:
        return
    down = module.factor("lora_A", rank, None)
    up = module.factor("lora_B", None, rank)
    sizes = module.factor("lora_E", rank, 1)
    alpha = config.lora_alpha if config.lora_alpha > 0 else rank
    source = f"lora_alpha {alpha} / (init_r {config.init_r} + 1e-5)"
    scale = Scale(factor=Fraction(alpha) / (config.init_r + _EPSILON), source=source)
    folded = up.to(torch.float64) * sizes.to(torch.float64)[:, 0]
    yield module.update(LowRank(down=down, up=folded, scale=scale))


def _read(modules: Sequence[Adapted], config: AdaLoraConfig) -> Reading:
    on = [name for name in ("use_rslora", "use_dora", "lora_bias") if getattr(config, name)]
    if on:
        raise UnmergeableAdapterError(f"{modules[0].file.path}: {on[0]} is set, which PEFT's ADALORA does not know")
    return Reading(updates=[update for module in modules for update in read_module(module, config)])


TUNER = Tuner(
    peft_type="ADALORA",
    config=AdaLoraConfig,
    slots=(("lora_[ABE]", ""),),
    copies={("ranknum", ""): "the rank before pruning, which the configuration names, too"},
    read=_read,
)
