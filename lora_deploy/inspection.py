"""What an adapter alone says about itself: per module its kind, rank, scale, norms, and how much of its rank is used.

Promise: no base is needed and no Δ is formed. Norms and effective ranks come from the r by r core of Δ = s·B·A, which
two thin QR factorisations leave: B = Q₁R₁, Aᵀ = Q₂R₂, so Δ = Q₁ (s·R₁R₂ᵀ) Q₂ᵀ has the singular values of the core. For
kinds that the base takes part in (DoRA, residuals) the figures are of s·B·A only.

The effective rank is exp(H(p)), H the entropy of p = σ / Σσ: between 1 and r, and 0 where Δ = 0.
Source: Roy and Vetterli, The effective rank: a measure of effective dimensionality, EUSIPCO 2007.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import singledispatch
from pathlib import Path

import torch
from torch import Tensor

from lora_deploy.adapter import Adapter, BaseHint, Experts, ModuleUpdate, OfWeight, Shapeless
from lora_deploy.errors import Finding, Severity
from lora_deploy.updates.addition import Addition
from lora_deploy.updates.dora import Dora
from lora_deploy.updates.interface import Scale, Update
from lora_deploy.updates.low_rank import LowRank
from lora_deploy.updates.replacement import Replacement
from lora_deploy.updates.residual import WithoutComponent
from lora_deploy.updates.token_rows import TokenRows


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What the tensors of one update show; None is what does not apply to its kind."""

    shape: tuple[int | None, ...]
    """Of what it changes, as the file lays it out; None is a side that only the base tells."""
    dtype: str
    """As stored, such as ``float16``; several are joined by commas."""
    rank: int | None = None
    scale: Scale | None = None
    down_norm: float | None = None
    """‖A‖ (Frobenius)."""
    up_norm: float | None = None
    """‖B‖ (Frobenius)."""
    delta_norm: float | None = None
    """‖Δ‖ (Frobenius), scale included."""
    effective_rank: float | None = None
    """Of Δ; of a stack of experts, their mean."""
    is_finite: bool = True
    is_untrained: bool = False
    """Whether a factor is all zero, so that Δ = 0: B as it was before training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleReport:
    """One update of the file: what it is for and what it is."""

    target: str
    """Tensor (for a stack of experts: module) that it changes, by the file's own name."""
    kind: str
    """Its name in ``KINDS``; ``experts`` for a stack whose parameter only the base tells."""
    measured: Measured
    keys: tuple[str, ...]
    component: str | None = None
    """Component of a pipeline, where the file names one."""
    method: str = ""
    """What its trainer calls it, where a file may have several methods."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """Everything that an adapter says without its base."""

    path: Path
    name: str
    format: str
    n_bytes: int
    """Size of the weights file."""
    sha256: str
    base_hint: BaseHint
    modules: tuple[ModuleReport, ...]
    tuner: str | None = None
    """PEFT's name of the method, where it is not LORA."""
    trained_with: str | None = None
    """What the file says of its training."""
    findings: tuple[Finding, ...]
    """What the reader noticed (untrained modules among it), then what the figures show."""


def inspect_adapter(adapter: Adapter) -> Inspection:
    """Measure every update of an adapter, in float64."""
    modules = (*map(_report, adapter.updates), *_waiting(adapter))
    return Inspection(
        path=adapter.path,
        name=adapter.name,
        format=adapter.format,
        n_bytes=adapter.path.stat().st_size,
        sha256=adapter.sha256,
        base_hint=adapter.base_hint,
        tuner=_tuner(adapter),
        trained_with=adapter.trained_with,
        modules=modules,
        findings=(*adapter.findings, *_surprises(modules)),
    )


def _tensors(value: object) -> Iterator[Tensor]:
    """Find every tensor that an update is made of."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)
    elif is_dataclass(value):
        for part in fields(value):
            yield from _tensors(getattr(value, part.name))


def _tuner(adapter: Adapter) -> str | None:
    named = adapter.config.get("peft_type") if adapter.format == "peft" else None
    return named if isinstance(named, str) and named != "LORA" else None


def singular_values(low_rank: LowRank) -> Tensor:
    """Give the singular values of Δ that may differ from zero: (r,) float64, descending; r or a smaller side of Δ."""
    up = torch.linalg.qr(low_rank.up.to(torch.float64), mode="r").R
    down = torch.linalg.qr(low_rank.down.to(torch.float64).T, mode="r").R
    values: Tensor = torch.linalg.svdvals(low_rank.scale.value * up @ down.T)
    return values


def effective_rank(values: Tensor) -> float:
    """Give exp(entropy) of singular values: (r,) float64, not negative.

    Source: Roy and Vetterli 2007, definition 1.
    """
    total = float(values.sum())
    if not total:
        return 0.0
    shares = values / total
    return float(torch.special.entr(shares).sum().exp())


def _report(module_update: ModuleUpdate) -> ModuleReport:
    update = module_update.update
    kind = "experts" if isinstance(update, Experts) else update.kind
    return ModuleReport(
        target=module_update.target,
        kind=kind,
        measured=_measured(update),
        keys=module_update.keys,
        component=module_update.components[0] if module_update.components else None,
        method=module_update.method,
    )


def _waiting(adapter: Adapter) -> Iterator[ModuleReport]:
    """Report the modules whose updates only the whole base tells."""
    wide = adapter.model_wide
    if wide is not None:
        for path, sides in wide.paths.items():
            measured = Measured(shape=sides, dtype=wide.dtype)
            yield ModuleReport(target=f"{path}.weight", kind=wide.kind, measured=measured, keys=wide.keys_of(path))


@singledispatch
def _measured(update: object) -> Measured:
    message = f"no figures for a {type(update).__name__}"
    raise NotImplementedError(message)


@_measured.register
def _(update: Update) -> Measured:
    """Kinds whose Δ is no product of two factors of the file: what can be said without forming it."""
    trained = [tensor for tensor in _tensors(update) if tensor.is_floating_point()]
    return Measured(
        shape=update.shape,
        dtype=_dtypes(*trained),
        scale=getattr(update, "scale", None),
        is_finite=_all_finite(*trained),
    )


@_measured.register
def _(update: Shapeless) -> Measured:
    return Measured(shape=update.known, dtype=_dtypes(*update.tensors), is_finite=_all_finite(*update.tensors))


@_measured.register
def _(update: OfWeight) -> Measured:
    trained = () if update.column is None else (update.column,)
    return Measured(shape=(None,), dtype=_dtypes(*trained) or "float32", is_finite=_all_finite(*trained))


@_measured.register
def _(update: LowRank) -> Measured:
    is_finite = _all_finite(update.down, update.up)
    values = singular_values(update) if is_finite else None
    return Measured(
        shape=update.shape,
        dtype=_dtypes(update.down, update.up),
        rank=update.rank,
        scale=update.scale,
        down_norm=_norm(update.down),
        up_norm=_norm(update.up),
        delta_norm=None if values is None else _norm(values),
        effective_rank=None if values is None else effective_rank(values),
        is_finite=is_finite,
        is_untrained=_is_untrained(update.down, update.up),
    )


@_measured.register
def _(update: WithoutComponent) -> Measured:
    return _measured(update.low_rank)


@_measured.register
def _(update: Dora) -> Measured:
    return _measured(update.inner)


@_measured.register
def _(update: Experts) -> Measured:
    is_finite = _all_finite(update.down, update.up)
    parameter = next(iter(update.scales))
    is_settled = len({scale.factor for scale in update.scales.values()}) == len(set(update.ranks.values())) == 1
    values = None
    if is_finite and is_settled:
        values = [singular_values(update.expert(parameter, e)) for e in range(update.n_experts(parameter))]
    return Measured(
        shape=(update.up.shape[0], update.down.shape[1]),
        dtype=_dtypes(update.down, update.up),
        rank=update.ranks[parameter] if is_settled else None,
        scale=update.scales[parameter] if is_settled else None,
        down_norm=_norm(update.down),
        up_norm=_norm(update.up),
        delta_norm=None if values is None else _norm(torch.cat(values)),
        effective_rank=None if not values else sum(map(effective_rank, values)) / len(values),
        is_finite=is_finite,
        is_untrained=_is_untrained(update.down, update.up),
    )


@_measured.register
def _(update: Addition) -> Measured:
    norm = _norm(update.values)
    return Measured(
        shape=tuple(update.values.shape),
        dtype=_dtypes(update.values),
        scale=update.scale,
        delta_norm=None if norm is None else abs(update.scale.value) * norm,
        is_finite=norm is not None,
        is_untrained=not bool(update.values.any()),
    )


@_measured.register(Replacement)
@_measured.register(TokenRows)
def _(update: Replacement | TokenRows) -> Measured:
    return Measured(
        shape=tuple(update.values.shape), dtype=_dtypes(update.values), is_finite=_all_finite(update.values)
    )


def _all_finite(*tensors: Tensor) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def _norm(tensor: Tensor) -> float | None:
    """Frobenius norm, or None where it is no number."""
    norm = float(torch.linalg.vector_norm(tensor.to(torch.float64)))
    return norm if norm < float("inf") else None


def _dtypes(*tensors: Tensor) -> str:
    return ", ".join(dict.fromkeys(str(tensor.dtype).removeprefix("torch.") for tensor in tensors))


def _is_untrained(*factors: Tensor) -> bool:
    return any(not bool(factor.any()) for factor in factors)


def _surprises(modules: tuple[ModuleReport, ...]) -> Iterator[Finding]:
    for module in modules:
        if not module.measured.is_finite:
            yield Finding(
                code="non-finite",
                severity=Severity.ERROR,
                target=module.target,
                message="its tensors hold NaN or infinity",
                source=", ".join(module.keys),
            )
