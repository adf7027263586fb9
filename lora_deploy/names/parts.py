"""Where rows of an update go."""

from __future__ import annotations

from dataclasses import dataclass

from lora_deploy.tensors import Region


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Where a run of an update's rows goes."""

    tensor: str
    region: Region | None = None
    """Part of the tensor; None is the whole."""
    rows: slice | None = None
    """Rows of the update that go there; None is all."""


def rows_of(region: Region, start: int, stop: int) -> Region:
    """Rows ``start:stop`` of a region."""
    return Region(offset=region.offset + start * region.n_cols, n_rows=stop - start, n_cols=region.n_cols)
