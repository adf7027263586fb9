"""OSF: the smaller singular components of the weight, trained on their own: they take the place of the weight's.

Source: peft 0.21.2, ``tuners/osf/layer.py``, ``get_delta_weight``, and ``model.py`` for the rank.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch

from lora_deploy.adapter import ModuleUpdate
from lora_deploy.adapters.adapted import Adapted
from lora_deploy.adapters.configuration import Number
from lora_deploy.adapters.tuners.config import TunerConfig
from lora_deploy.adapters.tuners.interface import Reading, Tuner
from lora_deploy.updates.interface import Scale
from lora_deploy.updates.kasa import Kasa
from lora_deploy.updates.low_rank import LowRank

_UNSCALED = Scale(factor=Fraction(1), source="OSF has no scale")


def read_module(module: Adapted, *, rank: Number | None, pattern: Mapping[str, Number]) -> ModuleUpdate:
    """Make the update of one module.

    Raises:
        MalformedAdapterError: Its tensors do not fit each other, or are of another rank than the configuration says.
    """
    up = module.factor("osf_svd_params.U_low", None, None)
    n_low = up.shape[1]
    sizes = module.factor("osf_svd_params.S_low", n_low)
    down = module.factor("osf_svd_params.V_low", n_low, None)
    smaller = min(up.shape[0], down.shape[1])
    chosen = next((value for key, value in pattern.items() if re.search(key, module.path)), rank)
    kept = _resolve(chosen, smaller)
    if n_low != smaller - kept:
        raise module.malformed(
            f"holds {n_low} of {smaller} components; the configuration keeps the {kept} largest as they are"
        )
    scaled = up.to(torch.float64) * sizes.to(torch.float64)  # exact: 48 bits
    return module.update(Kasa(low_rank=LowRank(down=down, up=scaled, scale=_UNSCALED)))


def _resolve(value: Number | None, smaller: int) -> int:
    """Give the number of components that stay as they are: half by default, a part of all, or a number."""
    if value is None:
        return smaller // 2
    number = int(smaller * value) if isinstance(value, float) and 0 < value <= 1 else int(value)
    return max(min(smaller, number), 0)


class OsfConfig(TunerConfig):
    """Configuration of OSF."""

    effective_rank: Number | None = None
    rank_pattern: dict[str, Number] | None = None
    target_svd_config: Any = None


def _read(modules: Sequence[Adapted], config: OsfConfig) -> Reading:
    pattern = config.rank_pattern or {}
    return Reading(updates=[read_module(module, rank=config.effective_rank, pattern=pattern) for module in modules])


TUNER = Tuner(peft_type="OSF", config=OsfConfig, slots=(("osf_svd_params", r"\.[USV]_low"),), read=_read)
