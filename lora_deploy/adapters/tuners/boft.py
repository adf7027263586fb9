"""BOFT: inputs turned by a butterfly of orthogonal blocks, outputs scaled: ``W' = s ⊙ (W·M^T)``, M = M_N ··· M_1.

Each M_i is block-diagonal between a permutation and its inverse. A butterfly of one stage permutes nothing. PEFT
without its CUDA extension trains with one stage whatever the configuration asks for, so their number is that of the
tensors.
Source: BOFT, arXiv:2311.06243; peft 0.21.2, ``tuners/boft/layer.py``, ``block_butterfly_perm``, ``get_delta_weight``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from lora_deploy.adapter import ModuleUpdate, Orientation, Shapeless
from lora_deploy.adapters.adapted import Adapted
from lora_deploy.adapters.tuners.config import TunerConfig
from lora_deploy.adapters.tuners.interface import Reading, Tuner
from lora_deploy.adapters.tuners.oft import cayley
from lora_deploy.updates.rotation import Blocks, Rotation


class BoftConfig(TunerConfig):
    """Configuration of BOFT; all sizes are those of the tensors."""

    boft_block_size: int | None = None
    boft_block_num: int | None = None
    boft_n_butterfly_factor: int | None = None


def butterfly(size: int, block: int, stage: int) -> Tensor:
    """Give the permutation of a stage, from 0: within runs of block·2^stage, even halves of blocks come first."""
    run, half = block << stage, block // 2
    chunks = torch.arange(run).reshape(-1, half)
    order = torch.cat([chunks[0::2], chunks[1::2]]).flatten()
    return (torch.arange(0, size, run)[:, None] + order[None, :]).flatten()


def read_module(module: Adapted) -> ModuleUpdate:
    """Make the update of one module.

    Raises:
        MalformedAdapterError: Its tensors do not fit each other.
    """
    stored = module.factor("boft_R", None, None, None, None)
    n_stages, n_blocks, width, other = stored.shape
    if width != other:
        raise module.malformed(f"boft_R has shape {tuple(stored.shape)}, expected square blocks")
    size = n_blocks * width
    if n_stages > 1 and (width % 2 or size % (width << (n_stages - 1))):
        raise module.malformed(f"{n_blocks} blocks of {width} make no butterfly of {n_stages} stages")
    lengths = module.factor("boft_s", None, None).flatten()  # (out, 1), or (1, out) of a convolution
    wide = stored.to(torch.float64)
    turned = cayley((wide - wide.transpose(2, 3)).flatten(0, 1) / 2).reshape(wide.shape)
    turns = []
    for stage in range(n_stages):
        blocks = turned[stage].transpose(1, 2).contiguous()
        order = None if n_stages == 1 else torch.argsort(butterfly(size, width, stage))
        turns.append(Blocks(blocks=blocks, n_blocks=n_blocks, order=order))
    make = partial(_rotation, tuple(turns), lengths)
    known = (len(lengths), size)
    shapeless = Shapeless(kind=Rotation.kind, known=known, make=make, tensors=(stored, lengths), takes_kernels=True)
    return module.update(shapeless, orientation=Orientation.STORED)  # PEFT adapts no Conv1D


def _rotation(turns: tuple[Blocks, ...], lengths: Tensor, n_out: int, n_in: int) -> Rotation:
    del n_in
    return Rotation(turns=turns, axis="columns", n_other=n_out, lengths=lengths)


def _read(modules: Sequence[Adapted], config: BoftConfig) -> Reading:
    del config
    return Reading(updates=[read_module(module) for module in modules])


TUNER = Tuner(peft_type="BOFT", config=BoftConfig, slots=(("boft_[Rs]", ""),), read=_read)
