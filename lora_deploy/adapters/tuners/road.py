"""ROAD: outputs turned in pairs and stretched, the bias with them.

Outputs come in groups; the first half of a group is paired with its second: ``y₁' = a·y₁ - s·y₂`` and
``y₂' = a·y₂ + s·y₁`` with a = α·cos θ and s = α·sin θ, which a pair shares (``road_1``), each output has of its own
(``road_2``), or each output has two of (``road_4``).
Source: RoAd, arXiv:2409.00119; peft 0.21.2, ``tuners/road/layer.py``, ``_prepare_cols`` and ``_apply_road``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from pydantic import Field
from torch import Tensor

from lora_deploy.adapter import ModuleUpdate, Shapeless
from lora_deploy.adapters.adapted import Adapted
from lora_deploy.adapters.tuners.config import TunerConfig
from lora_deploy.adapters.tuners.interface import Reading, Tuner
from lora_deploy.updates.rotation import Blocks, Rotation


class RoadConfig(TunerConfig):
    """Configuration of ROAD."""

    variant: str = "road_1"
    group_size: int = Field(default=64, gt=0)


def read_module(module: Adapted, config: RoadConfig) -> Iterator[ModuleUpdate]:
    """Make the updates of one module: of its weight, and of its bias.

    Raises:
        MalformedAdapterError: A variant that PEFT does not have, or tensors that do not fit the groups.
    """
    theta, alpha = module.factor("road_theta", None), module.factor("road_alpha", None)
    straight, crossed = _stretches(module, theta.to(torch.float64), alpha.to(torch.float64), config)
    turn = _turn(straight, crossed, config.group_size)
    known = (len(straight), None)
    make = partial(_rotation, turn)
    yield module.update(Shapeless(kind=Rotation.kind, known=known, make=make, tensors=(theta, alpha)))
    bias = module.update(Rotation(turns=(turn,), axis="rows", n_other=1))
    yield replace(bias, target=f"{module.path}.bias", is_optional=True)


def _stretches(module: Adapted, theta: Tensor, alpha: Tensor, config: RoadConfig) -> tuple[Tensor, Tensor]:
    """Give a and s of every output."""
    group = config.group_size
    widths = {"road_1": group // 2, "road_2": group, "road_4": 2 * group}
    width = widths.get(config.variant)
    if width is None or group % 2:
        raise module.malformed(f"variant {config.variant!r} with groups of {group} is none of peft <= 0.21.2")
    if theta.shape != alpha.shape or len(theta) % width:
        raise module.malformed(
            f"road_theta has {len(theta)} values and road_alpha {len(alpha)}, expected as many, a multiple of {width}"
        )
    if config.variant == "road_4":
        angles, sizes = theta.reshape(-1, 2, group), alpha.reshape(-1, 2, group)
        return (sizes[:, 0] * angles[:, 0].cos()).flatten(), (sizes[:, 1] * angles[:, 1].sin()).flatten()
    if config.variant == "road_1":
        theta = theta.reshape(-1, width).repeat_interleave(2, dim=0).flatten()
        alpha = alpha.reshape(-1, width).repeat_interleave(2, dim=0).flatten()
    return alpha * theta.cos(), alpha * theta.sin()


def _turn(straight: Tensor, crossed: Tensor, group: int) -> Blocks:
    """Write the pairs of each group as a matrix that vectors of outputs are multiplied with from the right."""
    n_groups, half = len(straight) // group, group // 2
    blocks = torch.diag_embed(straight.reshape(n_groups, group))
    s = crossed.reshape(n_groups, 2, half)
    first = torch.arange(half)
    blocks[:, first + half, first] = -s[:, 0]
    blocks[:, first, first + half] = s[:, 1]
    return Blocks(blocks=blocks, n_blocks=n_groups)


def _rotation(turn: Blocks, n_out: int, n_in: int) -> Rotation:
    del n_out
    return Rotation(turns=(turn,), axis="rows", n_other=n_in)


def _read(modules: Sequence[Adapted], config: RoadConfig) -> Reading:
    return Reading(updates=[update for module in modules for update in read_module(module, config)])


TUNER = Tuner(peft_type="ROAD", config=RoadConfig, slots=(("road_(theta|alpha)", ""),), read=_read)
