"""How long graphs take: base and merged, pair of sessions by pair of sessions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lora_deploy.release.plots.canvas import ACCENT, BOUND, INK, SECOND, canvas, rows_of, svg

_SIDES = ("merged", "base again", "unmerged")


def ratios(measurement: Mapping[str, Any], intervals: Mapping[str, Any], bound: float, title: str) -> str | None:
    """Draw what each pair said: the ratio of times to the base's, by side and phase, with the interval of its mean.

    ``intervals`` are those of the report: side, clock, phase, then ``low`` and ``high``.
    """
    clock = measurement.get("clock", "cpu")
    rows = _by_row(measurement, clock)
    if not rows:
        return None
    figure, axes = canvas(0.9 + 0.4 * len(rows))
    for k, ((side, phase), found) in enumerate(rows.items()):
        axes.plot([math.exp(value) for value in found], [k] * len(found), "|", color=ACCENT, markersize=10)
        interval = ((intervals.get(side) or {}).get(clock) or {}).get(phase)
        if interval:
            axes.plot([interval["low"], interval["high"]], [k + 0.3] * 2, color=SECOND, linewidth=2)
            axes.plot([interval["ratio"]], [k + 0.3], "o", color=SECOND, markersize=4)
    axes.axvspan(1 - bound, 1 + bound, color=BOUND, alpha=0.12, linewidth=0)
    axes.axvline(1, color=INK, linewidth=0.8)
    rows_of(axes, [f"{side}, {phase}" for side, phase in rows])
    axes.set_xlabel("time relative to the base: a line a pair, below them their mean with its interval; shaded: equal")
    return svg(figure, title)


def times(pairs: Sequence[Mapping[str, Any]], title: str) -> str | None:
    """Draw the median time of every session of base and merged, in milliseconds."""
    rows: dict[str, list[float]] = {}
    for phase in _phases(pairs, "medians"):
        for side in ("base", "merged"):
            found = [pair["medians"].get(side, {}).get(phase) for pair in pairs]
            rows[f"{side}, {phase}"] = [1e3 * float(seconds) for seconds in found if seconds is not None]
    rows = {label: found for label, found in rows.items() if found}
    if not rows:
        return None
    figure, axes = canvas(0.9 + 0.35 * len(rows))
    axes.boxplot(
        list(rows.values()),
        orientation="horizontal",
        positions=range(len(rows)),
        widths=0.5,
        boxprops={"color": ACCENT},
        whiskerprops={"color": ACCENT},
        capprops={"color": ACCENT},
        medianprops={"color": SECOND, "linewidth": 2},
        flierprops={"marker": ".", "markeredgecolor": ACCENT, "markersize": 3},
    )
    rows_of(axes, list(rows))
    axes.set_xlim(left=0)
    axes.set_xlabel("milliseconds, the median of each session")
    return svg(figure, title)


def _by_row(measurement: Mapping[str, Any], clock: str) -> dict[tuple[str, str], list[float]]:
    """Log ratios by side and phase."""
    pairs = measurement.get("pairs") or []
    rows: dict[tuple[str, str], list[float]] = {}
    for side in _SIDES:
        measured = [pair["log_ratios"][side][clock] for pair in pairs if side in pair["log_ratios"]]
        for phase in dict.fromkeys(phase for found in measured for phase in found):
            rows[side, phase] = [float(found[phase]) for found in measured if phase in found]
    return rows


def _phases(pairs: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    """List what was timed, in order."""
    return list(dict.fromkeys(phase for pair in pairs for found in pair[key].values() for phase in found))
