"""Sums over all rows of a region, in blocks whose size is part of the definition, however the merge is cut."""

from __future__ import annotations

from collections.abc import Iterator

REDUCED_ROWS = 1024
"""Part of the definition of every kind that sums over rows: changing it changes bytes."""


def row_blocks(n_rows: int, step: int = REDUCED_ROWS) -> Iterator[slice]:
    """Cut rows into blocks, in order; the last may be smaller."""
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))
