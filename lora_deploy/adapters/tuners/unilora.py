"""UNILORA: all factors of all layers are filled from one trained vector θ; a seed says which element goes where.

With ``save_indices`` the file says it, and by how much each element is scaled. Without, the elements are dealt out
again as PEFT does, with numpy, over all layers that ``target_modules`` means, in the order of the model's modules. The
base's class tells that order; what numpy shuffles for a seed may change between its releases: the release is told.

Definition: θ and the scale 1 / √(uses) in float32, as PEFT has them for a float32 model; their products are exact in
float64, and the product of the factors is a low-rank update like any other.
Source: Uni-LoRA, arXiv:2506.00799; peft 0.21.2, ``tuners/unilora/model.py``, ``_assign_unilora_indices_and_scales``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import partial

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from lora_deploy.adapter import Layer, ModelWide, ModuleUpdate
from lora_deploy.adapters.adapted import Adapted
from lora_deploy.adapters.tuners.config import TunerConfig
from lora_deploy.adapters.tuners.interface import Reading, Tuner
from lora_deploy.adapters.tuners.targets import is_target
from lora_deploy.errors import UnmergeableAdapterError
from lora_deploy.updates.interface import Scale
from lora_deploy.updates.low_rank import LowRank

_UNSCALED = Scale(factor=Fraction(1), source="Uni-LoRA has no scale beside that of θ's elements")


def read_module(module: Adapted, *, rank: int, length: int) -> ModuleUpdate:
    """Make the update of one module whose indices are in the file.

    Raises:
        MalformedAdapterError: Its tensors do not fit each other or the configuration.
    """
    theta = module.factor("unilora_theta_d", length)
    down = _filled(module, "A", theta, (rank, None))
    up = _filled(module, "B", theta, (None, rank))
    return module.update(LowRank(down=down, up=up, scale=_UNSCALED))


def _filled(module: Adapted, name: str, theta: Tensor, shape: tuple[int | None, int | None]) -> Tensor:
    indices = module.integers(f"unilora_indices_{name}", *shape, below=len(theta))
    scales = module.factor(f"unilora_scales_{name}", *indices.shape)
    return theta.to(torch.float64)[indices] * scales.to(torch.float64)


def dealt_out(
    theta: Tensor, rank: int, seed: int, keys: tuple[str, ...], layers: Sequence[Layer]
) -> Iterator[ModuleUpdate]:
    """Deal θ out over layers in order, A before B in each.

    Raises:
        UnmergeableAdapterError: There is no layer.
    """
    total = sum(rank * (layer.n_in + layer.n_out) for layer in layers)
    if not total:
        raise UnmergeableAdapterError("target_modules means no layer of the base")
    indices = deal(total, len(theta), seed)
    counts = torch.bincount(indices, minlength=len(theta))
    scales = torch.where(counts > 0, counts.float().rsqrt(), 0.0)
    values = theta.to(torch.float64)[indices] * scales.to(torch.float64)[indices]
    start = 0
    for layer in layers:
        middle, stop = start + rank * layer.n_in, start + rank * (layer.n_in + layer.n_out)
        down = values[start:middle].view(rank, layer.n_in)
        up = values[middle:stop].view(layer.n_out, rank)
        start = stop
        yield ModuleUpdate(target=f"{layer.path}.weight", update=LowRank(down=down, up=up, scale=_UNSCALED), keys=keys)


def deal(n_slots: int, length: int, seed: int) -> Tensor:
    """Assign an element of θ to each slot as PEFT does: all equally often, but for a rest, then shuffled.

    Source: peft 0.21.2, ``tuners/unilora/model.py``, ``generate_index``.
    """
    generator = np.random.default_rng(seed)
    dealt = np.repeat(np.arange(length), n_slots // length)
    if rest := n_slots % length:
        dealt = np.concatenate([dealt, generator.choice(length, size=rest, replace=False)])
    generator.shuffle(dealt)
    return torch.as_tensor(dealt, dtype=torch.long)


class UniLoraConfig(TunerConfig):
    """Configuration of UNILORA."""

    r: int = Field(default=4, gt=0)
    proj_seed: int = 42
    theta_d_length: int = Field(default=256, gt=0)
    save_indices: bool = False
    init_theta_d_bound: float | None = None


def _read(modules: Sequence[Adapted], config: UniLoraConfig) -> Reading:
    first = modules[0]
    if first.slots:
        return Reading(updates=[read_module(module, rank=config.r, length=config.theta_d_length) for module in modules])
    keys = tuple(first.shared.values())
    theta = first.factor("unilora_theta_d", config.theta_d_length)
    wide = ModelWide(
        kind=LowRank.kind,
        dtype=str(theta.dtype).removeprefix("torch."),
        keys=keys,
        paths={},
        is_target=partial(is_target, config),
        needs_order=True,
        reason="its indices are dealt out over all layers in their order",
        updates=partial(dealt_out, theta, config.r, config.proj_seed, keys),
    )
    told = (
        f"indices dealt out again with numpy {np.__version__}, proj_seed {config.proj_seed}; scales are float32's, "
        "training in 16 bits rounded them"
    )
    return Reading(updates=(), model_wide=wide, notes=(told,))


TUNER = Tuner(
    peft_type="UNILORA",
    config=UniLoraConfig,
    slots=(("unilora_(indices|scales)_[AB]", ""),),
    shared=(("unilora_theta_d", ""),),
    read=_read,
)
