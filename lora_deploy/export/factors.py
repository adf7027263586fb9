"""An adapter's factors as graphs take them: A (in, r) and B (r, out) of one matrix, the scale in B.

Promise: A·B is what the adapter adds, each factor rounded once to the graph's format; s·B is computed in float64. What
is no such product (another kind, a replacement, a trained bias, a structure of its own) is a finding, never dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_deploy.adapter import ModuleUpdate
from lora_deploy.errors import ExportError, Finding, Severity
from lora_deploy.export.products import Factor
from lora_deploy.rounding import round_once
from lora_deploy.tensors import Region
from lora_deploy.updates.low_rank import LowRank
from lora_deploy.updates.replacement import Replacement
from lora_deploy.validate import Binding


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Factors:
    """What one adapter adds to one matrix."""

    down: Tensor
    """A, (in, r), in the graph's format."""
    up: Tensor
    """B, (r, out), in the graph's format, times the scale."""


def ranks_of(entries: Sequence[ModuleUpdate]) -> int:
    """Rank of the sum of low-rank updates of one matrix."""
    return sum(entry.update.rank for entry in entries if isinstance(entry.update, LowRank))


def scales_of(entries: Sequence[ModuleUpdate]) -> tuple[float, ...]:
    """Scales of the updates of one matrix, in their order."""
    return tuple(entry.update.scale.value for entry in entries if isinstance(entry.update, LowRank))


def factors_of(entries: Sequence[ModuleUpdate], factor: Factor) -> Factors:
    """Lay the low-rank updates of one matrix out for the graph; several are one of the sum of their ranks.

    Raises:
        ExportError: A value exceeds the graph's format.
    """
    n_rows, n_cols = (factor.n_out, factor.n_in) if factor.is_turned else (factor.n_in, factor.n_out)
    ups, downs = [], []
    for entry in entries:
        update, region = entry.update, entry.region or Region.whole((n_rows, n_cols))
        assert isinstance(update, LowRank)  # noqa: S101 - the rest was refused
        up = torch.zeros(n_rows, update.rank, dtype=torch.float64)
        first = region.offset // n_cols
        up[first : first + region.n_rows] = update.up.to(torch.float64)
        down = update.down.to(torch.float64)
        # The scale goes to B, whichever of the two stored factors that is.
        ups.append(up * update.scale.value if factor.is_turned else up)
        downs.append(down if factor.is_turned else down * update.scale.value)
    rows, cols = torch.cat(ups, dim=1), torch.cat(downs, dim=0)
    down, up = (cols.T, rows.T) if factor.is_turned else (rows, cols)
    return Factors(down=_rounded(down, factor), up=_rounded(up, factor))


def _rounded(values: Tensor, factor: Factor) -> Tensor:
    rounded = round_once(values, factor.dtype).contiguous()
    if not bool(rounded.isfinite().all()):
        raise ExportError(
            f"{factor.tensor}: its factors, times the scale, exceed {factor.dtype.long_name}", hint="--dtype float32"
        )
    return rounded


def changes_of_structure(binding: Binding) -> Iterator[Finding]:
    """Say what of a binding needs another graph than the base's."""
    for key in binding.config_edits:
        yield _error("changes-config", "config.json", f"the adapter needs another {key}, and so another graph")
    for name, source in binding.outputs.items():
        if source != name or name in binding.shapes:
            yield _error("changes-structure", name, "the base's graph has no such tensor of its own")


def no_factors(binding: Binding, *, edited: Iterable[str] = ()) -> Iterator[Finding]:
    """Say which updates are no low-rank updates of a matrix.

    ``edited`` are tensors that the graph has as the adapter replaces them.
    """
    edited, own = frozenset(edited), binding.checkpoint.tensors
    for name, entries in binding.updates.items():
        source = binding.outputs.get(name)
        shape = binding.shapes.get(name, own[source].shape if source is not None else ())
        for entry in entries:
            if not (name in edited and isinstance(entry.update, Replacement)):
                yield from _no_factors(entry, shape)


def _no_factors(entry: ModuleUpdate, shape: tuple[int, ...]) -> Iterator[Finding]:
    update, region = entry.update, entry.region
    if not isinstance(update, LowRank):
        kind = getattr(update, "kind", "")
        yield _error(f"kind-{kind}", entry.target, f"found a {kind} update, expected plain low-rank factors")
    elif len(shape) != 2 or (region is not None and region.n_cols != shape[1]):
        yield _error("no-matrix", entry.target, f"its tensor is {list(shape)}, expected a matrix of its own")


def _error(code: str, target: str, message: str) -> Finding:
    return Finding(code=code, severity=Severity.ERROR, target=target, message=message)
