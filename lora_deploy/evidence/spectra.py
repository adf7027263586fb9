"""How much of its rank an adapter uses: the singular values of every low-rank update."""

from __future__ import annotations

from lora_deploy.inspection import singular_values
from lora_deploy.updates.low_rank import LowRank
from lora_deploy.validate import Binding


def spectra_of(binding: Binding) -> dict[str, tuple[float, ...]]:
    """Give the singular values of Δ = s·B·A, from the largest, by tensor; of several updates, the first one's."""
    found: dict[str, tuple[float, ...]] = {}
    for name, entries in binding.updates.items():
        update = next((entry.update for entry in entries if isinstance(entry.update, LowRank)), None)
        if update is not None and update.down.isfinite().all() and update.up.isfinite().all():
            found[name] = tuple(float(value) for value in singular_values(update))
    return found
