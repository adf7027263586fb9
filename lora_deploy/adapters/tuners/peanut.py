"""PEANUT: a small network computes the difference from the weight.

Source: PEANuT, arXiv:2410.01870; peft 0.21.2, ``tuners/peanut/layer.py``, ``_compute_delta_weight``.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import partial

from pydantic import Field
from torch import Tensor

from lora_deploy.adapter import ModuleUpdate, Shapeless
from lora_deploy.adapters.adapted import Adapted
from lora_deploy.adapters.tuners.config import TunerConfig
from lora_deploy.adapters.tuners.interface import Reading, Tuner
from lora_deploy.errors import UnmergeableAdapterError
from lora_deploy.updates.interface import Scale
from lora_deploy.updates.weight_network import ACTIVATIONS, WeightNetwork


def read_module(module: Adapted, *, rank: int, depth: int, activation: str, scaling: float) -> ModuleUpdate:
    """Make the update of one module; its inputs only the base tells.

    Raises:
        MalformedAdapterError: Its tensors do not fit each other or the configuration.
    """
    first = module.factor("peanut_A.weight", rank, None)
    last = module.factor("peanut_B.weight", first.shape[1], rank)
    encoders = tuple(module.factor(f"peanut_encoders.{k}.weight", rank, rank) for k in range(depth))
    decoders = tuple(module.factor(f"peanut_decoders.{k}.weight", rank, rank) for k in range(depth))
    if len(module.slots) != 2 + 2 * depth:
        raise module.malformed(f"holds {len(module.slots)} tensors, depth {depth} has {2 + 2 * depth}")
    scale = Scale(factor=Fraction(scaling), source=f"scaling {scaling:g}")
    make = partial(_network, first, encoders, decoders, last, activation, scale)
    return module.update(
        Shapeless(
            kind=WeightNetwork.kind,
            known=(first.shape[1], None),
            make=make,
            tensors=(first, last, *encoders, *decoders),
        )
    )


def _network(
    first: Tensor,
    encoders: tuple[Tensor, ...],
    decoders: tuple[Tensor, ...],
    last: Tensor,
    activation: str,
    scale: Scale,
    n_out: int,
    n_in: int,
) -> WeightNetwork:
    assert n_out == len(last)  # noqa: S101 - known from the file
    return WeightNetwork(
        first=first,
        encoders=encoders,
        decoders=decoders,
        last=last,
        activation=activation,
        scale=scale,
        n_cols=n_in,
    )


class PeanutConfig(TunerConfig):
    """Configuration of PEANUT."""

    r: int = Field(default=32, gt=0)
    depth: int = Field(default=0, ge=0)
    act_fn: str = "relu"
    scaling: float = Field(default=1.0, allow_inf_nan=False)


def _read(modules: Sequence[Adapted], config: PeanutConfig) -> Reading:
    if config.act_fn not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise UnmergeableAdapterError(
            f"{modules[0].file.path}: act_fn {config.act_fn!r}: known activations are {known}"
        )

    def update(module: Adapted) -> ModuleUpdate:
        return read_module(module, rank=config.r, depth=config.depth, activation=config.act_fn, scaling=config.scaling)

    return Reading(updates=[update(module) for module in modules])


TUNER = Tuner(
    peft_type="PEANUT",
    config=PeanutConfig,
    slots=(("peanut_[AB]", r"\.weight"), ("peanut_(en|de)coders", r"\.\d+\.weight")),
    read=_read,
)
