"""How far two sets of outputs are apart, position by position.

One figure decides, the divergence of a position: for logits the Kullback-Leibler divergence of the two next-token
distributions, in nats; for other outputs the squared distance, relative to the mean squared length of the reference's
rows. Both grow with the square of an error in the weights, so that tolerances and powers are stated alike. The largest
absolute difference is reported, but decides nothing: two correct ways to add the same numbers differ by it, too.

Promise: computed in float64; equal rows diverge by exactly 0; a NaN or infinity that the reference does not have
diverges by infinity.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lora_deploy.errors import EvidenceError

_ROWS = 64
"""Rows of logits in float64 at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """Figures of one output over all its positions."""

    output: str
    is_distribution: bool
    """Whether the divergence is Kullback-Leibler, in nats, rather than a squared relative distance."""
    mean: float
    largest: float
    max_abs: float
    mean_abs: float
    max_relative: float
    """Largest |difference|, relative to the reference's largest |value|."""
    mean_relative: float
    """Mean |difference|, relative to the reference's mean |value|."""
    top1: float | None
    """Part of the positions whose most likely class is the reference's, [0..1]; None without classes."""
    relative_l2: float
    """‖difference‖ / ‖reference‖ over all positions."""
    cosine: float
    """Of all values as one vector."""
    n_positions: int
    positions: tuple[float, ...]
    """The divergence of each position."""

    @property
    def measure(self) -> str:
        """What the divergence is called."""
        return "KL divergence" if self.is_distribution else "squared relative distance"

    def to_json(self) -> dict[str, Any]:
        """Give figures under names that say what they are."""
        shared = {
            "output": self.output,
            "max_abs": self.max_abs,
            "mean_abs": self.mean_abs,
            "max_relative": self.max_relative,
            "mean_relative": self.mean_relative,
            "relative_l2": self.relative_l2,
            "cosine": self.cosine,
            "n_positions": self.n_positions,
        }
        if not self.is_distribution:
            own = {"mean_square_distance": self.mean, "max_square_distance": self.largest}
            return own | shared | {"square_distance": list(self.positions)}
        return {"kl_mean": self.mean, "kl_max": self.largest, "top1": self.top1, **shared, "kl": list(self.positions)}


def is_distribution(output: str, width: int) -> bool:
    """Whether an output is the logits of classes, so that a softmax gives it its meaning.

    What CLIP calls ``logits_per_image`` has a class for every text of the batch: a comparison, and none for one text.
    """
    return output.startswith("logits") and not output.startswith("logits_per_") and width > 1


def diverge(output: str, reference: Tensor, subject: Tensor) -> Divergence:
    """Compare rows of one output, (n, width) each, of the same shape."""
    distances, top, sums = [], 0, torch.zeros(5, dtype=torch.float64)
    largest = largest_value = 0.0
    is_classes = is_distribution(output, reference.shape[1])
    for start in range(0, len(reference), _ROWS):
        one, other = (rows[start : start + _ROWS].to(torch.float64) for rows in (reference, subject))
        distances.append(_kl(one, other) if is_classes else (one - other).square().sum(dim=1))
        top += int((one.argmax(dim=1) == other.argmax(dim=1)).sum())
        gap = (one - other).abs()
        largest = max(largest, _worst(gap))
        largest_value = max(largest_value, float(one.abs().max()))
        sums += torch.stack(
            [gap.sum(), one.abs().sum(), gap.square().sum(), one.square().sum(), other.square().sum()]
        ).nan_to_num(nan=math.inf)
    found = torch.cat(distances).nan_to_num(nan=math.inf, posinf=math.inf)
    n, n_values = len(reference), max(1, reference.numel())
    gap_sum, size_sum, gap_square, square, other_square = sums.tolist()
    if not is_classes:
        found = found / max(square / max(n, 1), torch.finfo(torch.float64).tiny)
    dot = (square + other_square - gap_square) / 2
    return Divergence(
        output=output,
        is_distribution=is_classes,
        mean=float(found.mean()) if n else 0.0,
        largest=float(found.max()) if n else 0.0,
        max_abs=largest,
        mean_abs=gap_sum / n_values,
        max_relative=_ratio(largest, largest_value),
        mean_relative=_ratio(gap_sum, size_sum),
        top1=top / n if is_classes and n else None,
        relative_l2=math.sqrt(_ratio(gap_square, square)),
        cosine=_ratio(dot, math.sqrt(square * other_square)) if math.isfinite(gap_square) else math.nan,
        n_positions=n,
        positions=tuple(found.tolist()),
    )


def _worst(gap: Tensor) -> float:
    return float(gap.nan_to_num(nan=math.inf, posinf=math.inf).max()) if gap.numel() else 0.0


def _ratio(part: float, whole: float) -> float:
    if whole:
        return part / whole
    return math.inf if part else 0.0


def _kl(reference: Tensor, subject: Tensor) -> Tensor:
    """KL(reference ‖ subject) of each row, as Σ p·(eᵈ - 1 - d), d = log q - log p.

    No term is negative, so that tiny divergences are not lost in the difference of large sums.
    """
    log_p, log_q = reference.log_softmax(dim=1), subject.log_softmax(dim=1)
    d = log_q - log_p
    terms = log_p.exp() * (torch.expm1(d) - d)
    return terms.nan_to_num(nan=math.inf).sum(dim=1)


def join(parts: Mapping[str, Divergence]) -> tuple[Divergence, ...]:
    """Sum up divergences by probe (``probe/output``) into one an output: means by positions, extremes of extremes."""
    grouped: dict[str, list[Divergence]] = {}
    for part in parts.values():
        grouped.setdefault(part.output, []).append(part)
    return tuple(_joined(group) for group in grouped.values())


def _joined(parts: list[Divergence]) -> Divergence:
    n = sum(part.n_positions for part in parts) or 1

    def mean(name: str) -> float:
        return float(sum(getattr(part, name) * part.n_positions for part in parts) / n)

    def most(name: str) -> float:
        return float(max(getattr(part, name) for part in parts))

    return Divergence(
        output=parts[0].output,
        is_distribution=parts[0].is_distribution,
        mean=mean("mean"),
        largest=most("largest"),
        max_abs=most("max_abs"),
        mean_abs=mean("mean_abs"),
        max_relative=most("max_relative"),
        mean_relative=mean("mean_relative"),
        top1=mean("top1") if parts[0].top1 is not None else None,
        relative_l2=mean("relative_l2"),
        cosine=mean("cosine"),
        n_positions=sum(part.n_positions for part in parts),
        positions=tuple(value for part in parts for value in part.positions),
    )


def at_positions(parts: Divergences, kept: Mapping[str, Tensor]) -> dict[str, Divergence]:
    """Cut divergences by ``probe/output`` down to some positions, given by probe as (n,) bool; other probes go.

    Means and extremes are those of the positions that are left; what is not known by position stays that of all.
    """
    found = {}
    for name, part in parts.items():
        mask = kept.get(name.removesuffix(f"/{part.output}"))
        if mask is None or len(mask) != part.n_positions or not bool(mask.any()):
            continue
        left = tuple(value for value, is_kept in zip(part.positions, mask.tolist(), strict=True) if is_kept)
        found[name] = replace(
            part, mean=sum(left) / len(left), largest=max(left), n_positions=len(left), positions=left
        )
    return found


Divergences: TypeAlias = "Mapping[str, Divergence]"
"""By ``probe/output``."""


def compare_outputs(
    reference: Mapping[str, Mapping[str, Tensor]], subject: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Divergence]:
    """Compare every output that the subject gives, probe by probe.

    Raises:
        EvidenceError: An output has another shape than the reference's, or the reference does not have it.
    """
    found = {}
    for probe, outputs in subject.items():
        for name, rows in outputs.items():
            if not rows.is_floating_point() or name not in reference[probe] or name == "greedy margins":
                continue
            expected = reference[probe][name]
            if expected.shape != rows.shape:
                raise EvidenceError(
                    f"{probe}: {name}: found shape {tuple(rows.shape)}, the reference has {tuple(expected.shape)}"
                )
            found[f"{probe}/{name}"] = diverge(name, expected, rows)
    return found
