"""A figure in stand-in colours, and its SVG in those of the page."""

from __future__ import annotations

import re
from io import StringIO
from typing import TYPE_CHECKING

from lora_deploy.errors import ReleaseError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, ACCENT, BOUND, SECOND = "#010101", "#020202", "#030303", "#040404"
_COLOURS = {INK: "currentColor", ACCENT: "var(--accent)", BOUND: "var(--bound)", SECOND: "var(--second)"}
_WIDTH = 9.0


def canvas(height: float) -> tuple[Figure, Axes]:
    """Begin a plot of this height, in inches.

    Raises:
        ReleaseError: matplotlib is not installed.
    """
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
    axes.tick_params(colors=INK, labelsize=9, which="both")
    for side, spine in axes.spines.items():
        spine.set_visible(side in {"left", "bottom"})
        spine.set_color(INK)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set_color(INK)
        axis.label.set_fontsize(9)
        axis.offsetText.set_color(INK)
    return figure, axes


def rows_of(axes: Axes, labels: list[str]) -> None:
    """Name rows from the top."""
    axes.set_yticks(range(len(labels)), labels=labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)


def svg(figure: Figure, title: str) -> str:
    """Write the figure; what is drawn in our stand-in colours takes the page's."""
    out = StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Title": title})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    for stand_in, colour in _COLOURS.items():
        text = text.replace(stand_in, colour)
    text = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', r'<svg role="img" viewBox="\1">', text, count=1)
    return re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
