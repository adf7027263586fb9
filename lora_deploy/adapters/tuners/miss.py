"""MISS, and BONE as it was called until peft 0.18: a trained block that is repeated along the inputs.

By default and in mode ``mini`` the difference is a product: Δ = D^T·T where T (r, in) repeats the r by r identity, so
it is read as a low-rank update, which is exact. In mode ``bat`` the weight takes part.
Source: MiSS, arXiv:2409.15371; peft 0.21.2, ``tuners/miss/layer.py``; peft 0.17, ``tuners/bone/layer.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import partial

import torch
from pydantic import Field
from torch import Tensor

from lora_deploy.adapter import ModuleUpdate, Shapeless
from lora_deploy.adapters.adapted import Adapted
from lora_deploy.adapters.tuners.config import TunerConfig
from lora_deploy.adapters.tuners.interface import Reading, Tuner
from lora_deploy.errors import UnmergeableAdapterError
from lora_deploy.updates.block_affine import BlockAffine
from lora_deploy.updates.interface import Scale
from lora_deploy.updates.low_rank import LowRank

_UNSCALED = Scale(factor=Fraction(1), source="MiSS has no scale")


def read_module(module: Adapted, slot: str, mode: object) -> ModuleUpdate:
    """Make the update of one module; ``mode`` is the configuration's ``init_weights``.

    Raises:
        MalformedAdapterError: A block of another shape than its mode has.
    """
    if mode == "bat":
        blocks = module.factor(slot, None, None, None)
        n_down, r, width = blocks.shape
        if r != width:
            raise module.malformed(f"{slot} has shape {tuple(blocks.shape)}, expected square blocks")
        make = partial(_affine, blocks)
        shapeless = Shapeless(kind=BlockAffine.kind, known=(n_down * r, None), make=make, tensors=(blocks,))
        return module.update(shapeless)
    block = module.factor(slot, None, None)
    n_out = None if mode == "mini" else int(block.shape[1])
    return module.update(
        Shapeless(kind=LowRank.kind, known=(n_out, None), make=partial(_tiled, block), tensors=(block,))
    )


def _affine(blocks: Tensor, n_out: int, n_in: int) -> BlockAffine:
    r = blocks.shape[1]
    if n_in % r:
        raise UnmergeableAdapterError(f"blocks are {r} wide, base has {n_in} inputs, no multiple")
    assert n_out == len(blocks) * r  # noqa: S101 - known from the file
    return BlockAffine(blocks=blocks, n_cols=n_in, scale=_UNSCALED)


def _tiled(block: Tensor, n_out: int, n_in: int) -> LowRank:
    r, width = block.shape
    if n_out % width:
        raise UnmergeableAdapterError(f"the block is repeated every {width} outputs, base has {n_out}, no multiple")
    if r > n_in:
        raise UnmergeableAdapterError(f"the block has {r} inputs, base only {n_in}")
    tiles = torch.eye(r, dtype=block.dtype).repeat(1, -(-n_in // r))[:, :n_in]
    return LowRank(down=tiles, up=block.T.repeat(n_out // width, 1), scale=_UNSCALED)


class MissConfig(TunerConfig):
    """Configuration of MISS and BONE."""

    r: int = Field(default=64, gt=0)
    mini_r: int = Field(default=1, gt=0)


def _read(modules: Sequence[Adapted], config: MissConfig) -> Reading:
    slot = f"{config.peft_type.lower()}_block"
    for module in modules:
        sides = module.file.tensors[module.slots[slot]].shape
        is_mini = config.init_weights == "mini"
        if config.r not in sides or (is_mini and tuple(sides) != (config.r, config.mini_r)):
            wanted = f"({config.r}, {config.mini_r})" if is_mini else f"r {config.r}"
            raise module.malformed(f"{slot} has shape {tuple(sides)}, the configuration says {wanted}")
    return Reading(updates=[read_module(module, slot, config.init_weights) for module in modules])


MISS, BONE = (
    Tuner(peft_type=name.upper(), config=MissConfig, slots=((f"{name}_block", ""),), read=_read)
    for name in ("miss", "bone")
)
