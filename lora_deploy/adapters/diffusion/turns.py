"""OFT and BOFT of sd-scripts and LyCORIS: outputs turned by the Cayley transform R = (I + Q)(I − Q)⁻¹ of Q = B − B^T.

OFT turns each block of rows by R^T; BOFT turns regrouped rows by R, stage after stage. Alpha times the number of
outputs limits the length of Q. ``rescale`` multiplies rows at last.
Source: LyCORIS 4.1.3, ``modules/diag_oft.py`` and ``modules/boft.py``; sd-scripts 0.9, ``networks/oft.py``.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lora_deploy.adapter import Shapeless
from lora_deploy.adapters.adapted import Adapted
from lora_deploy.errors import UnmergeableAdapterError
from lora_deploy.updates.rotation import Blocks, Rotation

_NO_LENGTH = 1e-8
"""What LyCORIS adds to the length of Q before it limits it."""


def turned(module: Adapted, scale_of: object) -> Shapeless:
    """Make the update of a module whose outputs are turned; it has no scale.

    Raises:
        MalformedAdapterError: Tensors that do not fit each other.
        UnmergeableAdapterError: A limit that trainers understand differently.
    """
    del scale_of
    stored = module.any_factor("oft_blocks")
    if stored.ndim not in {3, 4} or stored.shape[-1] != stored.shape[-2]:
        raise module.malformed(f"oft_blocks has shape {tuple(stored.shape)}, expected square blocks")
    n_blocks, width = int(stored.shape[-3]), int(stored.shape[-1])
    n_out = n_blocks * width
    turns = _cayley(_limited(module, stored, n_out))
    if stored.ndim == 3:
        stages = [Blocks(blocks=turns, n_blocks=n_blocks)]  # W'_k = R_k^T·W_k: columns of W_k times R_k from the right
    else:
        stages = [_butterfly(module, turns[i], i) for i in range(len(turns))]
    lengths = module.any_factor("rescale", n_least=1).flatten() if "rescale" in module.slots else None
    if lengths is not None and len(lengths) != n_out:
        raise module.malformed(f"rescale has {len(lengths)} elements, expected one for each of {n_out} outputs")
    tensors = (stored,) if lengths is None else (stored, lengths)
    make = partial(_rotation, tuple(stages), lengths)
    return Shapeless(kind=Rotation.kind, known=(n_out, None), make=make, tensors=tensors, takes_kernels=True)


def _rotation(turns: tuple[Blocks, ...], lengths: Tensor | None, n_out: int, n_in: int) -> Rotation:
    del n_out
    return Rotation(turns=turns, axis="rows", n_other=n_in, lengths=lengths)


def _limited(module: Adapted, stored: Tensor, n_out: int) -> Tensor:
    """Q = B − B^T, shortened to alpha·out where alpha says so.

    Raises:
        UnmergeableAdapterError: Alpha is 0 in sd-scripts' OFT, which then turns nothing.
    """
    wide = stored.to(torch.float64)
    skew = wide - wide.transpose(-1, -2)
    alpha = module.number("alpha")
    if not alpha:
        if alpha is not None and module.file.metadata.get("ss_network_module", "").startswith("networks.oft"):
            raise UnmergeableAdapterError(
                f"{module.file.path}: {module.path}: alpha is 0: sd-scripts' OFT turns nothing then",
                hint="if LyCORIS trained it, where 0 is no limit, take ss_network_module out of the header",
            )
        return skew
    limit, length = float(alpha) * n_out, float(torch.linalg.vector_norm(skew)) + _NO_LENGTH
    return skew * (limit / length) if length > limit else skew


def _cayley(skew: Tensor) -> Tensor:
    """(I + Q)(I − Q)⁻¹, float64."""
    identity = torch.eye(skew.shape[-1], dtype=torch.float64)
    solved: Tensor = torch.linalg.solve(identity - skew, identity + skew, left=False)
    return solved


def _butterfly(module: Adapted, turns: Tensor, stage: int) -> Blocks:
    """One stage of BOFT: each run of 2·k rows is regrouped, k = 2^stage·b / 2, and R (not its transpose) is applied."""
    n_blocks, width = int(turns.shape[0]), int(turns.shape[1])
    half = (width // 2) << stage
    if width % 2 or (n_blocks * width) % (2 * half):
        raise module.malformed(f"{n_blocks} blocks of {width} have no stage {stage}")
    order = torch.arange(n_blocks * width).reshape(-1, 2, half).transpose(1, 2).flatten()
    return Blocks(blocks=turns.transpose(1, 2).contiguous(), n_blocks=n_blocks, order=order)
