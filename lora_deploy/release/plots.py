"""Plots of a release, as SVG that takes its colours from the page around it.

Promise: text stays text, nothing is fetched, nothing is random: the same figures give the same bytes. Colours come from
the page's style, so that a plot reads in light and dark; a plot without figures is None.
Source: matplotlib 3.11, its SVG backend.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from io import StringIO
from typing import TYPE_CHECKING, Any

from lora_deploy.errors import ReleaseError
from lora_deploy.merge.record import RecordedTensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _ACCENT, _BOUND, _SECOND = "#010101", "#020202", "#030303", "#040404"
_COLOURS = {_INK: "currentColor", _ACCENT: "var(--accent)", _BOUND: "var(--bound)", _SECOND: "var(--second)"}
_WIDTH = 9.0
_LAYER = re.compile(r"^(?P<before>.*?)\.(?P<layer>\d+)\.(?P<module>.*)$")
_MAX_SPECTRA = 400


def heatmap(tensors: Mapping[str, RecordedTensor], figure_of: str, title: str) -> str | None:
    """Draw one figure of every adapted tensor, layer by module."""
    cells: dict[tuple[str, int], float] = {}
    for name, tensor in tensors.items():
        value, match = getattr(tensor, figure_of), _LAYER.match(name)
        if value is not None and match is not None:
            cells[f"{match['before']}.N.{match['module'].removesuffix('.weight')}", int(match["layer"])] = float(value)
    if not cells:
        return None
    modules = sorted({module for module, _ in cells})
    layers = range(max(layer for _, layer in cells) + 1)
    rows = [[cells.get((module, layer), float("nan")) for layer in layers] for module in modules]
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    figure, axes = _figure(0.8 + 0.34 * len(modules))
    edges = [layer - 0.5 for layer in range(len(layers) + 1)]
    mesh = axes.pcolormesh(edges, range(len(modules) + 1), rows, cmap="viridis", edgecolors="none")
    axes.set_yticks([k + 0.5 for k in range(len(modules))], labels=[_short(module) for module in modules])
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer")
    bar = figure.colorbar(mesh, ax=axes, pad=0.02, format=ScalarFormatter(useOffset=False))
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=_INK, labelsize=8)
    return _svg(figure, title)


def spectra(values: Mapping[str, Sequence[float]], title: str) -> str | None:
    """Draw the singular values of every update, each relative to its largest."""
    shown = [found for found in values.values() if found and found[0] > 0][:_MAX_SPECTRA]
    if not shown:
        return None
    figure, axes = _figure(3.0)
    for found in shown:
        ranks = range(1, len(found) + 1)
        axes.plot(ranks, [v / found[0] for v in found], color=_ACCENT, alpha=max(0.08, 3 / len(shown)), linewidth=1)
    axes.set_xlabel("singular value, from the largest")
    axes.set_ylabel("relative to the largest")
    axes.set_ylim(0, 1.02)
    return _svg(figure, title)


def positions(probes: Mapping[str, Mapping[str, Any]], bound: float | None, title: str) -> str | None:
    """Draw the divergence at every position of every probe, on a logarithmic scale, and what is allowed."""
    points = [float(v) for probe in probes.values() for v in probe.get("kl") or probe.get("square_distance") or []]
    if not points:
        return None
    smallest = min((point for point in points if point > 0), default=1e-16)
    figure, axes = _figure(3.0)
    axes.semilogy([max(point, smallest) for point in points], ".", color=_ACCENT, markersize=3)
    start = 0
    for probe in probes.values():
        start += len(probe.get("kl") or probe.get("square_distance") or [])
        axes.axvline(start - 0.5, color=_INK, alpha=0.15, linewidth=0.8)
    if bound:
        axes.axhline(bound, color=_BOUND, linewidth=1.2)
        axes.annotate("allowed", (0, bound), color=_BOUND, fontsize=8, va="bottom")
    axes.set_xlabel("position, probe after probe")
    return _svg(figure, title)


def ratios(measurement: Mapping[str, Any], bound: float, title: str) -> str | None:
    """Draw what each pair of sessions said: the ratio of times to the base's, by phase and side."""
    clock = measurement.get("clock", "cpu")
    samples = _samples(measurement, clock)
    if not samples:
        return None
    figure, axes = _figure(0.9 + 0.45 * len(samples))
    for row, (_, found) in enumerate(samples):
        axes.plot(found, [row] * len(found), "|", color=_ACCENT, markersize=10)
        middle = sorted(found)[len(found) // 2]
        axes.plot([middle], [row], "o", color=_SECOND, markersize=5)
    axes.axvspan(1 - bound, 1 + bound, color=_BOUND, alpha=0.12, linewidth=0)
    axes.axvline(1, color=_INK, linewidth=0.8)
    axes.set_yticks(range(len(samples)), labels=[label for label, _ in samples])
    axes.set_ylim(len(samples) - 0.5, -0.5)
    axes.set_xlabel("time relative to the base; a line a pair, a dot their median; shaded: called equal")
    return _svg(figure, title)


def _samples(measurement: Mapping[str, Any], clock: str) -> list[tuple[str, list[float]]]:
    import math

    found: dict[str, list[float]] = {}
    for pair in measurement.get("pairs") or []:
        for side, by_clock in (pair.get("ratios") or {}).items():
            for phase, value in (by_clock.get(clock) or {}).items():
                found.setdefault(f"{side}, {phase}", []).append(math.exp(float(value)))
    return sorted(found.items())


def _figure(height: float) -> tuple[Figure, Axes]:
    try:
        import matplotlib as mpl
    except ImportError as error:
        hint = "pip install 'lora-deploy[release]'"
        raise ReleaseError("the report needs matplotlib", hint=hint, code="missing-package") from error
    from matplotlib.figure import Figure

    mpl.rcParams["svg.fonttype"] = "none"
    mpl.rcParams["svg.hashsalt"] = "lora-deploy"
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.tick_params(colors=_INK, labelsize=8)
    for side, spine in axes.spines.items():
        spine.set_visible(side in {"left", "bottom"})
        spine.set_color(_INK)
    axes.xaxis.label.set_color(_INK)
    axes.yaxis.label.set_color(_INK)
    return figure, axes


def _svg(figure: Figure, title: str) -> str:
    """Write the figure; what is drawn in our stand-in colours takes the page's."""
    out = StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Title": title})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    for stand_in, colour in _COLOURS.items():
        text = text.replace(stand_in, colour)
    text = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', r'<svg role="img" viewBox="\1">', text, count=1)
    return re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)


def _short(module: str) -> str:
    return module.partition(".N.")[2]
