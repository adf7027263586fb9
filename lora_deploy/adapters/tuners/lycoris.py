"""LOHA and LOKR, which PEFT took from LyCORIS; it scales by alpha / r even where both factors are whole.

PEFT adapts no Conv1D with them.
Source: peft 0.21.2, ``tuners/loha/layer.py`` and ``tuners/lokr/layer.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from pydantic import Field

from lora_deploy.adapter import Orientation
from lora_deploy.adapters.adapted import Adapted
from lora_deploy.adapters.configuration import Number
from lora_deploy.adapters.peft.config import PeftConfig
from lora_deploy.adapters.peft.scale import Scales
from lora_deploy.adapters.products import loha, lokr
from lora_deploy.adapters.tuners.config import TunerConfig
from lora_deploy.adapters.tuners.interface import Reading, Tuner
from lora_deploy.updates.addition import Addition
from lora_deploy.updates.interface import Scale
from lora_deploy.updates.kronecker import Kronecker


class LycorisConfig(TunerConfig):
    """Configuration of LOHA and LOKR."""

    r: int = Field(default=8, gt=0)
    alpha: Number = Field(default=8, allow_inf_nan=False)
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    alpha_pattern: dict[str, Number] = Field(default_factory=dict)

    # Shown by the tensors.
    use_effective_conv2d: Any = None
    decompose_both: Any = None
    decompose_factor: Any = None
    rank_dropout_scale: Any = None


def _lokr(module: Adapted, scale_of: Callable[[int | None], Scale]) -> Kronecker | Addition:
    """PEFT leaves out the axis of a one-dimensional kernel when it aligns w1 (a, b) with a whole w2 (c, d, k).

    The product is (c, a·d, b·k); its elements in their order are trained and merged as the weight's (a·c, b·d, k).
    """
    update = lokr(module, scale_of)
    key = module.slots.get("lokr_w2")
    if key is None or module.file.tensors[key].ndim != 3:
        return update
    whole = module.file.tensors[key].to(torch.float64)
    product = torch.kron(update.left[None].to(torch.float64), whole)
    return Addition(values=product.reshape(update.shape[0], -1), scale=update.scale)


def _read(modules: Sequence[Adapted], config: LycorisConfig) -> Reading:
    file = modules[0].file
    scales = Scales(
        path=file.path,
        config=PeftConfig(
            peft_version=config.peft_version,
            r=config.r,
            lora_alpha=config.alpha,
            rank_pattern=config.rank_pattern,
            alpha_pattern=config.alpha_pattern,
        ),
        config_name=file.config_path.name if file.config_path else file.path.name,
        has_alpha="alpha" in config.model_fields_set,
    )
    make = loha if config.peft_type == "LOHA" else _lokr
    return Reading(
        updates=[
            module.update(make(module, partial(_scale, scales, module.path)), orientation=Orientation.STORED)
            for module in modules
        ]
    )


def _scale(scales: Scales, path: str, rank: int | None) -> Scale:
    return scales.of(path, rank)[1]


LOHA = Tuner(peft_type="LOHA", config=LycorisConfig, slots=((r"hada_(w[12]_[ab]|t[12])", ""),), read=_read)
LOKR = Tuner(peft_type="LOKR", config=LycorisConfig, slots=((r"lokr_(w[12](_[ab])?|t2)", ""),), read=_read)
