"""How far outputs are from the unmerged model's: of each subject, and at every position of every probe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_deploy.release.plots.canvas import ACCENT, BOUND, INK, canvas, rows_of, svg

_NAMED = 12
"""Probes beyond which their names would lie over each other."""


def subjects(found: Sequence[Mapping[str, Any]], title: str) -> str | None:
    """Draw the mean divergence of every subject's outputs beside what is allowed, on a logarithmic scale."""
    rows = []
    for subject in found:
        allowed = {entry["output"]: float(entry["mean"]) for entry in subject.get("tolerances") or []}
        for output in subject.get("outputs") or []:
            value = output.get("kl_mean", output.get("relative_l2"))
            if value is not None and output["output"] in allowed:
                name = subject["name"] if len(subject["outputs"]) == 1 else f"{subject['name']}: {output['output']}"
                rows.append((name, float(value), allowed[output["output"]]))
    if not rows:
        return None
    figure, axes = canvas(0.8 + 0.3 * len(rows))
    smallest = min((value for _, value, _ in rows if value > 0), default=1e-16)
    axes.set_xscale("log")
    for k, (_, value, bound) in enumerate(rows):
        axes.plot([max(value, smallest)], [k], "o", color=ACCENT, markersize=5)
        axes.plot([bound], [k], "|", color=BOUND, markersize=14, markeredgewidth=2)
    rows_of(axes, [name for name, _, _ in rows])
    axes.set_xlabel("mean distance to the unmerged model (dot), and what is allowed (bar)")
    return svg(figure, title)


def positions(probes: Mapping[str, Mapping[str, Any]], bound: float | None, title: str) -> str | None:
    """Draw the divergence at every position of every probe, on a logarithmic scale, and what is allowed."""
    by_probe = [
        (name, [float(v) for v in probe.get("kl") or probe.get("square_distance") or []])
        for name, probe in probes.items()
    ]
    by_probe = [(name, points) for name, points in by_probe if points]
    points = [point for _, found in by_probe for point in found]
    if not points:
        return None
    smallest = min((point for point in points if point > 0), default=1e-16)
    figure, axes = canvas(3.0)
    axes.semilogy([max(point, smallest) for point in points], ".", color=ACCENT, markersize=3)
    start, middles = 0, []
    for name, found in by_probe:
        middles.append((start + (len(found) - 1) / 2, name.partition("/")[0]))
        start += len(found)
        if start < len(points):
            axes.axvline(start - 0.5, color=INK, alpha=0.25, linewidth=0.8)
    if bound:
        axes.axhline(bound, color=BOUND, linewidth=1.2)
        axes.annotate("allowed", (0, bound), color=BOUND, fontsize=9, va="bottom")
    if 1 < len(middles) <= _NAMED:
        axes.set_xticks([middle for middle, _ in middles], labels=[name for _, name in middles])
        axes.set_xlabel("position, probe after probe")
    else:
        axes.set_xlabel("position" if len(middles) == 1 else f"position, {len(middles)} probes one after another")
    return svg(figure, title)
