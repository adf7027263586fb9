"""How large the files of a release are."""

from __future__ import annotations

from collections.abc import Sequence

from lora_deploy.release.plots.canvas import ACCENT, canvas, rows_of, svg

_SHOWN = 10
_UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("bytes", 1))


def bars(sizes: Sequence[tuple[str, int]], title: str) -> str | None:
    """Draw the largest files as bars."""
    largest = [entry for entry in sorted(sizes, key=lambda entry: -entry[1])[:_SHOWN] if entry[1]]
    if not largest:
        return None
    unit, factor = next((unit, factor) for unit, factor in _UNITS if largest[0][1] >= factor)
    figure, axes = canvas(0.8 + 0.28 * len(largest))
    axes.barh(range(len(largest)), [n_bytes / factor for _, n_bytes in largest], color=ACCENT, height=0.6)
    rows_of(axes, [path for path, _ in largest])
    axes.set_xlabel(unit)
    return svg(figure, title)
