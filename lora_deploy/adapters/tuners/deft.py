"""DEFT and PaRa: what the weight has in a trained subspace is taken out, and with DEFT something else put there.

Source: peft 0.21.2, ``tuners/deft/layer.py``; PaRa, arXiv:2406.05641.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from typing import Literal

from pydantic import Field
from torch import Tensor

from lora_deploy.adapter import ModuleUpdate, Shapeless
from lora_deploy.adapters.adapted import Adapted
from lora_deploy.adapters.configuration import Number
from lora_deploy.adapters.tuners.config import TunerConfig
from lora_deploy.adapters.tuners.interface import Reading, Tuner
from lora_deploy.updates.interface import Scale
from lora_deploy.updates.subspace import Subspace


def read_module(
    module: Adapted, *, method: Literal["relu", "qr"], alpha: float | None, is_removal: bool
) -> ModuleUpdate:
    """Make the update of one module; a removal's inputs only the base tells.

    Raises:
        MalformedAdapterError: P and R do not fit each other or the configuration.
    """
    directions = module.factor("deft_P", None, None)
    rank = directions.shape[1]
    scale = Scale(factor=Fraction(1), source="no alpha")
    if alpha:
        scale = Scale(factor=Fraction(alpha) / rank, source=f"alpha {alpha:g} / r {rank}")
    if is_removal:
        if "deft_R" in module.slots:
            raise module.malformed("has a deft_R, but para is set")
        make = partial(_removal, directions, method, scale)
        known = (directions.shape[0], None)
        return module.update(Shapeless(kind=Subspace.kind, known=known, make=make, tensors=(directions,)))
    injected = module.factor("deft_R", rank, None)
    return module.update(
        Subspace(directions=directions, method=method, injected=injected, scale=scale, n_in=injected.shape[1])
    )


def _removal(directions: Tensor, method: Literal["relu", "qr"], scale: Scale, n_out: int, n_in: int) -> Subspace:
    assert n_out == len(directions)  # noqa: S101 - known from the file
    return Subspace(directions=directions, method=method, injected=None, scale=scale, n_in=n_in)


class DeftConfig(TunerConfig):
    """Configuration of DEFT."""

    r: int = Field(default=8, gt=0)
    decomposition_method: Literal["relu", "qr"] = "relu"
    alpha: Number | None = Field(default=None, allow_inf_nan=False)
    para: bool = False
    init_scale: float | None = None


def _read(modules: Sequence[Adapted], config: DeftConfig) -> Reading:
    def update(module: Adapted) -> ModuleUpdate:
        return read_module(module, method=config.decomposition_method, alpha=config.alpha, is_removal=config.para)

    return Reading(updates=[update(module) for module in modules])


TUNER = Tuner(peft_type="DEFT", config=DeftConfig, slots=(("deft_[PR]", ""),), read=_read)
