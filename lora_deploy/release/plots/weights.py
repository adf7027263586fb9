"""What the adapter does to the weights: figures by layer and module, and the spectra of its updates."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from lora_deploy.release.plots.canvas import ACCENT, INK, canvas, svg

_LAYER = re.compile(r"^(?P<before>.*?)\.(?P<layer>\d+)\.(?P<module>.*)$")
_MAX_SPECTRA = 400


def heatmap(values: Mapping[str, float], title: str) -> str | None:
    """Draw one figure of every adapted tensor, by its name, layer by module."""
    cells: dict[tuple[str, int], float] = {}
    for name, value in values.items():
        match = _LAYER.match(name)
        if match is not None:
            module = f"{match['before']}.N.{match['module'].removesuffix('.weight')}"
            cells[module, int(match["layer"])] = float(value)
    if not cells:
        return None
    modules = sorted({module for module, _ in cells})
    layers = range(max(layer for _, layer in cells) + 1)
    rows = [[cells.get((module, layer), float("nan")) for layer in layers] for module in modules]
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    figure, axes = canvas(0.8 + 0.34 * len(modules))
    edges = [layer - 0.5 for layer in range(len(layers) + 1)]
    mesh = axes.pcolormesh(edges, range(len(modules) + 1), rows, cmap="viridis", edgecolors="none")
    axes.set_yticks([k + 0.5 for k in range(len(modules))], labels=_short(modules))
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer")
    bar = figure.colorbar(mesh, ax=axes, pad=0.02, format=ScalarFormatter(useOffset=False))
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=INK, labelsize=9)
    return svg(figure, title)


def spectra(values: Mapping[str, Sequence[float]], title: str) -> str | None:
    """Draw the singular values of every update, each relative to its largest."""
    shown = [found for found in values.values() if found and found[0] > 0][:_MAX_SPECTRA]
    if not shown:
        return None
    from matplotlib.ticker import MaxNLocator

    figure, axes = canvas(3.0)
    alpha = min(1.0, max(0.08, 3 / len(shown)))
    for found in shown:
        ranks = range(1, len(found) + 1)
        axes.plot(ranks, [v / found[0] for v in found], color=ACCENT, alpha=alpha, linewidth=1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("singular value, from the largest")
    axes.set_ylabel("relative to the largest")
    axes.set_ylim(0, 1.02)
    return svg(figure, title)


def _short(modules: Sequence[str]) -> list[str]:
    """Leave out what stands before the layer, unless two modules need it."""
    short = [module.partition(".N.")[2] for module in modules]
    return short if len({*short}) == len(short) else list(modules)
