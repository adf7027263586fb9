"""How much of the adapter's effect is left in quantised graphs: the change of outputs there, beside the true one.

Both changes are from base to merged: quantised merged minus quantised base, and unmerged minus base. What quantisation
does to both models alike cancels; what is left is the adapter, and noise that has nothing to do with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_deploy.evidence.divergence import is_distribution
from lora_deploy.evidence.forward import Outputs

_ROWS = 64
"""Rows in float64 at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Survival:
    """The quantised change beside the true one, over all positions as one vector."""

    cosine: float
    norm_ratio: float
    """‖quantised change‖ / ‖true change‖; noise makes it larger than 1."""

    @property
    def share(self) -> float:
        """How much of the true change is in the quantised one: 1 is all of it, 0 none, whatever noise is beside it."""
        return self.cosine * self.norm_ratio


def survivals(unmerged: Outputs, base: Outputs, merged: Outputs, quantised_base: Outputs) -> Mapping[str, Survival]:
    """Compare changes, by output; only what ``merged`` has is compared, and logits without what softmax ignores.

    Shapes: rows (n, width) by probe and output, alike on all sides.
    """
    sums: dict[str, Tensor] = {}
    for probe, outputs in merged.items():
        for name, rows in outputs.items():
            if not rows.is_floating_point() or name not in unmerged[probe]:
                continue
            sides = (unmerged[probe][name], base[probe][name], rows, quantised_base[probe][name])
            sums[name] = sums.get(name, torch.zeros(3, dtype=torch.float64)) + _products(name, *sides)
    return {name: _survival(*found.tolist()) for name, found in sums.items()}


def _products(output: str, unmerged: Tensor, base: Tensor, merged: Tensor, quantised_base: Tensor) -> Tensor:
    """Inner product of both changes, and their squared lengths."""
    found = torch.zeros(3, dtype=torch.float64)
    for start in range(0, len(merged), _ROWS):
        part = slice(start, start + _ROWS)
        true = unmerged[part].double() - base[part].double()
        left = merged[part].double() - quantised_base[part].double()
        if is_distribution(output, true.shape[1]):  # a constant added to all logits of a position says nothing
            true, left = true - true.mean(dim=1, keepdim=True), left - left.mean(dim=1, keepdim=True)
        found += torch.stack([(true * left).sum(), true.square().sum(), left.square().sum()])
    return found


def _survival(product: float, true: float, left: float) -> Survival:
    if not all(math.isfinite(value) for value in (product, true, left)):
        return Survival(cosine=math.nan, norm_ratio=math.nan)
    lengths = math.sqrt(true) * math.sqrt(left)
    return Survival(
        cosine=product / lengths if lengths else 0.0,
        norm_ratio=math.sqrt(left / true) if true else math.inf if left else 0.0,
    )
