"""VERA and PVERA: trained vectors around a pair of random matrices that all layers share.

``Δ = diag(λ_b)·B[:out]·diag(λ_d)·A[:, :in]``. Of PVeRA's λ_d and A only the first halves count, which give the mean;
the others give the variance of what training samples.

With ``save_projection`` off the file lacks A and B: they are drawn again as PEFT draws them when it loads, A first,
with the sizes of the largest adapted layer. What torch draws for a seed may change between its releases: the release is
told.
Source: VeRA, arXiv:2310.11454; peft 0.21.2, ``tuners/vera/model.py``, ``_init_vera_A_vera_B``, and ``tuners/pvera``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

import torch
from pydantic import Field
from torch import Tensor

from lora_deploy.adapter import Layer, ModelWide, ModuleUpdate, Shapeless
from lora_deploy.adapters.adapted import Adapted
from lora_deploy.adapters.tuners.config import TunerConfig
from lora_deploy.adapters.tuners.interface import Reading, Tuner
from lora_deploy.errors import UnmergeableAdapterError
from lora_deploy.updates.interface import Scale
from lora_deploy.updates.scaled_product import ScaledProduct

_UNSCALED = Scale(factor=Fraction(1), source="VeRA has no scale")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Projections:
    """The matrices that layers share."""

    down: Tensor
    """(r or more, max in); the first r rows count."""
    up: Tensor
    """(max out, r)."""


def shared_projections(module: Adapted, prefix: str) -> Projections:
    """Read the saved projections.

    Raises:
        MalformedAdapterError: They do not fit each other.
    """
    up = module.factor(f"{prefix}_B", None, None)
    rank = up.shape[1]
    down = module.factor(f"{prefix}_A", rank * _halves(prefix), None)
    return Projections(down=down, up=up)


def with_projections(module: Adapted, prefix: str, projections: Projections) -> ModuleUpdate:
    """Make the update of one module; how many inputs it has only the base tells.

    Raises:
        MalformedAdapterError: Its vectors do not fit the projections.
    """
    rank = projections.up.shape[1]
    row = module.factor(f"{prefix}_lambda_b", None)
    inner = module.factor(f"{prefix}_lambda_d", rank * _halves(prefix))[:rank]
    if len(row) > len(projections.up):
        raise module.malformed(f"{prefix}_lambda_b has {len(row)} values, {prefix}_B only {len(projections.up)} rows")
    make = partial(_scaled_product, projections, row, inner)
    shapeless = Shapeless(kind=ScaledProduct.kind, known=(len(row), None), make=make, tensors=(row, inner))
    return module.update(shapeless)


def drawn_again(modules: Sequence[Adapted], prefix: str, *, rank: int, seed: int) -> ModelWide:
    """Make the updates of all modules with projections that are drawn once the base tells the largest sizes."""
    trained = modules[0].factor(f"{prefix}_lambda_b", None)
    return ModelWide(
        kind=ScaledProduct.kind,
        dtype=str(trained.dtype).removeprefix("torch."),
        keys=tuple(key for module in modules for key in module.slots.values()),
        paths={module.path: (len(module.factor(f"{prefix}_lambda_b", None)), None) for module in modules},
        needs_order=False,
        reason="its projections are not in the file, and have the size of the largest layer that it adapts",
        updates=partial(_with_drawn, tuple(modules), prefix, rank, seed),
    )


def draw(prefix: str, rank: int, seed: int, n_out: int, n_in: int) -> Projections:
    """Draw projections as PEFT does: float32, from torch's generator of the CPU, A before B."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    down = _kaiming_uniform(rank * _halves(prefix), n_in, generator)
    return Projections(down=down, up=_kaiming_uniform(n_out, rank, generator))


def _kaiming_uniform(n_rows: int, n_cols: int, generator: torch.Generator) -> Tensor:
    bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(n_cols))
    return torch.empty(n_rows, n_cols).uniform_(-bound, bound, generator=generator)


def _with_drawn(
    modules: Sequence[Adapted], prefix: str, rank: int, seed: int, layers: Sequence[Layer]
) -> Iterator[ModuleUpdate]:
    n_out, n_in = max(layer.n_out for layer in layers), max(layer.n_in for layer in layers)
    projections = draw(prefix, rank, seed, n_out, n_in)
    return (with_projections(module, prefix, projections) for module in modules)


def _scaled_product(projections: Projections, row: Tensor, inner: Tensor, n_out: int, n_in: int) -> ScaledProduct:
    if n_in > projections.down.shape[1]:
        raise UnmergeableAdapterError(f"the shared projection has {projections.down.shape[1]} inputs, base has {n_in}")
    return ScaledProduct(
        up=projections.up[:n_out],
        down=projections.down[: len(inner), :n_in],
        inner=inner,
        row=row,
        scale=_UNSCALED,
    )


def _halves(prefix: str) -> int:
    return 2 if prefix == "pvera" else 1


def read(
    modules: Sequence[Adapted], prefix: str, *, rank: int, seed: int
) -> tuple[Iterable[ModuleUpdate], ModelWide | None]:
    """Read all modules, with the saved projections or with drawn ones.

    Raises:
        MalformedAdapterError: Vectors and projections do not fit.
    """
    if not modules or f"{prefix}_A" not in modules[0].shared:
        return (), drawn_again(modules, prefix, rank=rank, seed=seed)
    projections = shared_projections(modules[0], prefix)
    return [with_projections(module, prefix, projections) for module in modules], None


class VeraConfig(TunerConfig):
    """Configuration of VERA and PVERA."""

    r: int = Field(default=256, gt=0)
    projection_prng_key: int = 0
    save_projection: bool = True
    d_initial: float | None = None
    init_vera_weights: bool | None = None
    sample_at_inference: bool = False
    generator_seed: int | None = None


def _read(modules: Sequence[Adapted], config: VeraConfig) -> Reading:
    prefix = config.peft_type.lower()
    if config.sample_at_inference:
        message = f"{modules[0].file.path}: sample_at_inference is set: its outputs are drawn at random"
        raise UnmergeableAdapterError(message)
    updates, wide = read(modules, prefix, rank=config.r, seed=config.projection_prng_key)
    told = f"projections drawn again with torch {torch.__version__}, projection_prng_key {config.projection_prng_key}"
    return Reading(updates=updates, model_wide=wide, notes=(told,) if wide else ())


VERA, PVERA = (
    Tuner(
        peft_type=prefix.upper(),
        config=VeraConfig,
        slots=((f"{prefix}_lambda_[bd]", ""),),
        shared=((f"{prefix}_[AB]", ""),),
        read=_read,
    )
    for prefix in ("vera", "pvera")
)
