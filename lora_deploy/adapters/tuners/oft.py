"""OFT: blocks of inputs turned by orthogonal matrices: ``W' = W·diag(R₁, R₂ …)^T``; of embeddings, ``W·diag(R₁ …)``.

Three generations are told apart by their tensors. Since peft 0.16, ``oft_R`` (n, b·(b-1)/2) holds the upper triangles
of skew-symmetric matrices Q; R is ``(I - Q)(I + Q)⁻¹``, or a Neumann series, which approximates the *inverse* of that.
In 0.14 and 0.15, ``oft_r`` (n, b, b) with ``oft_s`` (out, 1) is not yet skew-symmetric. Until 0.13, ``oft_r`` alone
turns outputs; where its blocks are wider than the outputs, the last one was cut, which is refused.

PEFT adapts no Conv1D with it. On convolutions, its forward turns the unfolded input and folds it again, which no kernel
can do: the merge is what PEFT merges to, and a warning says so.

Peft 0.16 and 0.17 also doubled the last term of the series. They wrote no ``peft_version``; all later releases do.
Source: OFT, arXiv:2306.07280; peft 0.21.2, ``tuners/oft/layer.py``; 0.17.0, 0.15.2 and 0.13.2 of the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from lora_deploy.adapter import ModuleUpdate, Orientation, Shapeless
from lora_deploy.adapters.adapted import Adapted
from lora_deploy.adapters.tuners.config import TunerConfig
from lora_deploy.adapters.tuners.interface import Reading, Tuner
from lora_deploy.errors import UnmergeableAdapterError
from lora_deploy.updates.rotation import Blocks, Rotation

_SINGLE_LAST_TERM = (0, 18)
_OF_KERNELS = (
    "merged as PEFT merges it, which is not what was trained: its forward turns what is under the kernel, and adds "
    "it up where kernels overlap"
)


class OftConfig(TunerConfig):
    """Configuration of OFT; sizes of blocks are those of the tensors."""

    r: int | None = None
    oft_block_size: int | None = None
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5
    use_exact_inverse: bool | None = None

    @property
    def doubles_last_term(self) -> bool:
        """Whether the release that wrote the file doubled the last term of the series."""
        return self.version is None or self.version < _SINGLE_LAST_TERM


def cayley(skew: Tensor) -> Tensor:
    """(I - Q)(I + Q)⁻¹ of skew-symmetric matrices (n, b, b), float64."""
    identity = torch.eye(skew.shape[-1], dtype=torch.float64)
    solved: Tensor = torch.linalg.solve(identity + skew, identity - skew, left=False)
    return solved


def neumann(skew: Tensor, n_terms: int, *, doubles_last: bool) -> Tensor:
    """Approximate (I + Q)(I - Q)⁻¹ by ``n_terms`` terms, as PEFT does: I + 2Q + 2Q² … + Qⁿ⁻¹.

    Of three terms PEFT <= 0.21.2 makes four: its loop adds the last power in any case.
    """
    result = torch.eye(skew.shape[-1], dtype=torch.float64) + torch.zeros_like(skew)
    if n_terms > 1:
        result = result + 2 * skew
    if n_terms > 2:
        power = skew @ skew
        result = result + 2 * power
        last = n_terms - 1 if doubles_last else max(n_terms - 2, 2)
        for _ in range(3, last + 1):
            power = power @ skew
            result = result + 2 * power
        if not doubles_last:
            result = result + power @ skew
    return result


def skew_symmetric(upper: Tensor, size: int) -> Tensor:
    """Make skew-symmetric matrices (n, b, b) from their upper triangles (n, b·(b-1)/2), row by row, in float64."""
    matrices = torch.zeros((len(upper), size, size), dtype=torch.float64)
    row, column = torch.triu_indices(size, size, 1)
    matrices[:, row, column] = upper.to(torch.float64)
    return matrices - matrices.transpose(1, 2)


def constrained(skew: Tensor, eps: float) -> Tensor:
    """Shorten matrices that are longer than eps / √n, as constrained OFT does."""
    bound = eps / math.sqrt(len(skew))
    norms = torch.linalg.matrix_norm(skew)[:, None, None]
    return torch.where(norms <= bound, skew, bound * skew / norms)


def read_module(module: Adapted, config: OftConfig) -> ModuleUpdate:
    """Make the update of one module; how many outputs it has only the base tells.

    Raises:
        MalformedAdapterError: Tensors that no generation writes.
        UnmergeableAdapterError: A generation's option that cannot be reproduced.
    """
    if "oft_r" in module.slots:
        return _older(module, config)
    is_embedding = "oft_embedding_R.weight" in module.slots
    upper = module.factor("oft_embedding_R.weight" if is_embedding else "oft_R.weight", None, None)
    size = (1 + math.isqrt(1 + 8 * int(upper.shape[1]))) // 2
    if size * (size - 1) // 2 != upper.shape[1]:
        raise module.malformed(f"{upper.shape[1]} numbers a block are no triangle of a square")
    skew = skew_symmetric(upper, size)
    if config.coft:
        skew = constrained(skew, config.eps)
    turns = (
        neumann(skew, config.num_cayley_neumann_terms, doubles_last=config.doubles_last_term)
        if config.use_cayley_neumann
        else cayley(skew)
    )
    blocks = turns if is_embedding else turns.transpose(1, 2)
    return module.update(_of_inputs(blocks, config, upper), orientation=Orientation.STORED)


def _of_inputs(blocks: Tensor, config: OftConfig, trained: Tensor, lengths: Tensor | None = None) -> Shapeless:
    n_out = None if lengths is None else len(lengths)
    n_in = None if config.block_share else len(blocks) * int(blocks.shape[1])
    make = partial(_rotation, blocks, lengths)
    tensors = (trained,) if lengths is None else (trained, lengths)
    return Shapeless(
        kind=Rotation.kind,
        known=(n_out, n_in),
        make=make,
        tensors=tensors,
        takes_kernels=True,
        kernel_caveat=_OF_KERNELS if lengths is None else "",
    )


def _rotation(blocks: Tensor, lengths: Tensor | None, n_out: int, n_in: int) -> Rotation:
    width = int(blocks.shape[1])
    if n_in % width:
        raise UnmergeableAdapterError(f"blocks of {width} inputs, base has {n_in}, no multiple")
    turn = Blocks(blocks=blocks, n_blocks=n_in // width)
    return Rotation(turns=(turn,), axis="columns", n_other=n_out, lengths=lengths)


def _older(module: Adapted, config: OftConfig) -> ModuleUpdate:
    """Read tensors of peft 0.15 and before."""
    stored = module.factor("oft_r", None, None, None)
    if stored.shape[1] != stored.shape[2]:
        raise module.malformed(f"oft_r has shape {tuple(stored.shape)}, expected square blocks")
    if config.coft:
        raise UnmergeableAdapterError(
            f"{module.file.path}: constrained OFT (coft) of peft <= 0.15 projects while it trains: the file does not "
            "say where that ended",
            hint="load and save it with the peft that trained it, merged",
        )
    wide = stored.to(torch.float64)
    turns = cayley((wide - wide.transpose(1, 2)) / 2)
    if "oft_s" in module.slots:
        lengths = module.factor("oft_s", None, 1)[:, 0]
        return module.update(_of_inputs(turns.transpose(1, 2), config, stored, lengths), orientation=Orientation.STORED)
    make = partial(_of_outputs, turns)
    n_out = None if config.block_share else len(turns) * int(turns.shape[1])
    shapeless = Shapeless(kind=Rotation.kind, known=(n_out, None), make=make, tensors=(stored,), takes_kernels=True)
    return module.update(shapeless, orientation=Orientation.STORED)


def _of_outputs(blocks: Tensor, n_out: int, n_in: int) -> Rotation:
    width = int(blocks.shape[1])
    if n_out % width:
        raise UnmergeableAdapterError(f"blocks of {width} outputs, base has {n_out}, no multiple")
    turn = Blocks(blocks=blocks, n_blocks=n_out // width)
    return Rotation(turns=(turn,), axis="rows", n_other=n_in)


def _read(modules: Sequence[Adapted], config: OftConfig) -> Reading:
    return Reading(updates=[read_module(module, config) for module in modules])


TUNER = Tuner(
    peft_type="OFT",
    config=OftConfig,
    slots=(("oft_(embedding_)?R", r"\.weight"), ("oft_[rs]", "")),
    read=_read,
)
