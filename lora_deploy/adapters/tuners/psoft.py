"""PSOFT: the weight's principal components turned among themselves by a trained matrix R.

``psoft_orth`` trains a skew Q: R = (I + Q)·(I − Q)⁻¹, or its Neumann series; two vectors scale rows and columns.
Definition: R in float64.
Source: peft 0.21.2, ``tuners/psoft/layer.py``, ``OrthLayer.get_matrix``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from lora_deploy.adapter import ModuleUpdate, Shapeless
from lora_deploy.adapters.adapted import Adapted
from lora_deploy.adapters.configuration import Number
from lora_deploy.adapters.tuners.config import TunerConfig
from lora_deploy.adapters.tuners.interface import Reading, Tuner
from lora_deploy.errors import UnmergeableAdapterError
from lora_deploy.updates.principal import Principal, Randomised


@dataclass(frozen=True, slots=True, kw_only=True)
class Neumann:
    """How the inverse is replaced by a series."""

    n_terms: int
    largest_norm: float | None
    """Frobenius norm that Q is scaled down to where it is longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turning:
    """What the configuration says of R and of the factorisation around it."""

    rank: int
    is_orthogonal: bool
    has_rows: bool
    """Whether ``vector_b`` scales R's rows."""
    has_columns: bool
    """Whether ``vector_a`` scales its columns."""
    neumann: Neumann | None
    is_split: bool
    randomised: Randomised | None


def read_module(module: Adapted, turning: Turning) -> ModuleUpdate:
    """Make the update of one module; its size only the base tells.

    Raises:
        MalformedAdapterError: R's tensors do not fit the configuration.
    """
    rotation = matrix_of(module, turning)
    make = partial(_principal, rotation, turning)
    return module.update(Shapeless(kind=Principal.kind, known=(None, None), make=make, tensors=(rotation,)))


def matrix_of(module: Adapted, turning: Turning) -> Tensor:
    """Form R: (r, r) float64.

    Raises:
        MalformedAdapterError: Its tensors do not fit the configuration.
    """
    rank = turning.rank
    if turning.is_orthogonal:
        upper = torch.zeros((rank, rank), dtype=torch.float64)
        if rank > 1:
            row, column = torch.triu_indices(rank, rank, 1)
            upper[row, column] = module.factor("psoft_R.weight", rank * (rank - 1) // 2).to(torch.float64)
        matrix = _orthogonal(upper - upper.T, turning.neumann)
    else:
        matrix = module.factor("psoft_R.weight", rank, rank).to(torch.float64)
    if turning.has_rows:
        matrix = module.factor("psoft_R.vector_b", rank).to(torch.float64)[:, None] * matrix
    if turning.has_columns:
        matrix = matrix * module.factor("psoft_R.vector_a", rank).to(torch.float64)
    return matrix


def _orthogonal(skew: Tensor, neumann: Neumann | None) -> Tensor:
    identity = torch.eye(len(skew), dtype=torch.float64)
    if neumann is None:
        solved: Tensor = torch.linalg.solve(identity - skew, identity + skew, left=False)
        return solved
    norm = float(torch.linalg.matrix_norm(skew))
    if neumann.largest_norm is not None and norm > neumann.largest_norm:
        skew = skew * (neumann.largest_norm / (norm + 1e-12))
    if neumann.n_terms <= 1:
        return identity
    total, power = identity + 2 * skew, skew
    if neumann.n_terms > 2:
        # As PEFT adds them: 2·Q², 2·Q³ … and the last power once; of three terms and of four the same.
        power = skew @ skew
        total = total + 2 * power
        for _ in range(3, neumann.n_terms - 1):
            power = power @ skew
            total = total + 2 * power
        total = total + power @ skew
    return total


def _principal(rotation: Tensor, turning: Turning, n_out: int, n_in: int) -> Principal:
    if len(rotation) > min(n_out, n_in):
        raise UnmergeableAdapterError(f"R is {tuple(rotation.shape)}, base is (out, in) = ({n_out}, {n_in})")
    return Principal(
        rotation=rotation, is_split=turning.is_split, randomised=turning.randomised, n_rows=n_out, n_cols=n_in
    )


class PsoftConfig(TunerConfig):
    """Configuration of PSOFT; its alpha divides what it multiplies again."""

    r: int = Field(default=32, gt=0)
    psoft_alpha: Number | None = None
    ab_svd_init: Literal["psoft_init", "pissa_init"] = "psoft_init"
    psoft_svd: Literal["full", "lowrank"] = "full"
    psoft_svd_lowrank_niter: int = Field(default=10, ge=0)
    random_seed: int = 0
    psoft_orth: bool = True
    psoft_mag_b: bool = True
    psoft_mag_a: bool = True
    use_cayley_neumann: bool = False
    num_cayley_neumann_terms: int = 5
    cayley_neumann_eps: float | None = None


def _read(modules: Sequence[Adapted], config: PsoftConfig) -> Reading:
    neumann = Neumann(n_terms=config.num_cayley_neumann_terms, largest_norm=config.cayley_neumann_eps)
    randomised = Randomised(n_iterations=config.psoft_svd_lowrank_niter, seed=config.random_seed)
    turning = Turning(
        rank=config.r,
        is_orthogonal=config.psoft_orth,
        has_rows=config.psoft_mag_b,
        has_columns=config.psoft_mag_a,
        neumann=neumann if config.use_cayley_neumann else None,
        is_split=config.ab_svd_init == "pissa_init",
        randomised=randomised if config.psoft_svd == "lowrank" else None,
    )
    told = (
        f"the weight is factorised again in float32 with torch {torch.__version__}: training on another device may "
        "have seen other signs"
    )
    return Reading(updates=[read_module(module, turning) for module in modules], notes=(told,))


TUNER = Tuner(peft_type="PSOFT", config=PsoftConfig, slots=(("psoft_R", r"\.(weight|vector_[ab])"),), read=_read)
