"""Whether the delta was added another number of times than once: the scale's usual mistakes, and any other factor."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch

from lora_deploy.adapter import ModuleUpdate
from lora_deploy.evidence.explanation import Explanation
from lora_deploy.evidence.outcome import Outcome
from lora_deploy.evidence.survey import Subject, rounded
from lora_deploy.merge.plan import PlannedTensor
from lora_deploy.updates.addition import Addition
from lora_deploy.updates.additive import Additive
from lora_deploy.updates.dora import Dora
from lora_deploy.updates.low_rank import LowRank
from lora_deploy.updates.residual import Residual, WithoutComponent

_LARGEST = 2.0**12
"""Factors are looked for between this and its negative."""
_BISECTIONS = 40
_SAME = 1e-2
"""How near an estimate is to a known factor to be taken for it, relative."""


def find_factor(subject: Subject) -> Iterator[Explanation]:
    """Explain a tensor by a delta that was added another number of times than once."""
    meanings = _known_factors(subject.tensor)
    estimate = _estimate(subject)
    if estimate is not None:
        known = min(meanings, key=lambda factor: abs(factor - estimate))
        candidates = [known] if abs(known - estimate) <= _SAME * abs(known) else [*meanings, estimate]
    else:
        candidates = [*meanings]
    errors = {factor: subject.error_of(_scaled(subject, factor)) for factor in candidates}
    factor = min(errors, key=lambda factor: errors[factor])
    if subject.accepts(_scaled(subject, factor)):
        meaning = f": {meanings[factor]}" if factor in meanings else ""
        message = f"the update is there {factor:.4g} times instead of once{meaning}"
        yield Explanation(outcome=Outcome.WRONG_SCALE, message=message, factor=factor)


def _known_factors(tensor: PlannedTensor) -> dict[float, str]:
    """Name the factors that mistakes about the scale come to, by value; equal ones together."""
    low_rank = next((found for entry in tensor.updates if (found := _low_rank_of(entry.update)) is not None), None)
    named = [(2.0, "added twice"), (0.5, "halved"), (-1.0, "subtracted")]
    if low_rank is not None and low_rank.rank and (scale := low_rank.scale.value):
        named += [(1 / scale, f"scale 1 instead of {scale:.4g}"), (scale, f"scale {scale:.4g} applied twice")]
        rank, root = float(low_rank.rank), math.sqrt(low_rank.rank)
        if low_rank.scale.root == 1:
            named += [(root, "alpha / sqrt(r) instead of alpha / r"), (rank, "alpha instead of alpha / r")]
            named += [(1 / rank, "divided by r twice")]
        else:
            named += [(1 / root, "alpha / r instead of alpha / sqrt(r)"), (root, "alpha instead of alpha / sqrt(r)")]
    meanings: dict[float, str] = {}
    for factor, meaning in named:
        same = next((known for known in meanings if math.isclose(known, factor, rel_tol=1e-9)), None)
        if same is not None:
            meanings[same] += f", or {meaning}"
        elif not math.isclose(factor, 1):
            meanings[factor] = meaning
    return meanings


def _low_rank_of(update: object) -> LowRank | None:
    if isinstance(update, Dora):
        return _low_rank_of(update.inner)
    if isinstance(update, WithoutComponent):
        return update.low_rank
    return update if isinstance(update, LowRank) else None


def _scaled(subject: Subject, factor: float) -> PlannedTensor:
    return subject.with_updates([_times(entry, factor) for entry in subject.tensor.updates])


def _times(entry: ModuleUpdate, factor: float) -> ModuleUpdate:
    update = entry.update
    if isinstance(update, LowRank | Addition):
        return replace(entry, update=update.weighted(factor))
    if isinstance(update, WithoutComponent):
        return replace(entry, update=replace(update, low_rank=update.low_rank.weighted(factor)))
    if isinstance(update, Dora):
        inner = _times(replace(entry, update=update.inner), factor).update
        assert isinstance(inner, LowRank | Residual | Additive)  # noqa: S101 - as it was
        return replace(entry, update=replace(update, inner=inner))
    return entry


def _estimate(subject: Subject) -> float | None:
    """Find the factor whose rounded result has the same inner product with the delta as the stored values.

    The inner product grows with the factor even where the format's step is larger than the delta. None where the
    updates are not additive.
    """
    if not all(isinstance(entry.update, LowRank | Addition) for entry in subject.tensor.updates):
        return None
    block, stored = subject.sample(subject.tensor)
    delta = block.delta
    if not bool(delta.any()):
        return None

    def product(factor: float) -> float:
        return float(((rounded(block.base + factor * delta, subject.grain) - block.base) * delta).sum())

    wanted = float(((stored - block.base) * delta).sum())
    low, high = -_LARGEST, _LARGEST
    if not product(low) < wanted < product(high):
        return None
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if product(middle) < wanted else (low, middle)
    fitted = float(torch.dot((stored - block.base).view(-1), delta.view(-1)) / delta.square().sum())
    linear = subject.error(block.base + fitted * delta, stored)
    return fitted if linear < subject.error(block.base + low * delta, stored) else low
