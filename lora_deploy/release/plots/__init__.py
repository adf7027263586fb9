"""Plots of a release, as SVG that takes its colours from the page around it; a file a subject.

Promise: text stays text, nothing is fetched, nothing is random: the same figures give the same bytes. Colours come from
the page's style, so that a plot reads in light and dark; a plot without figures is None.
Source: matplotlib 3.11, its SVG backend.
"""

from __future__ import annotations

from lora_deploy.release.plots.latency import ratios, times
from lora_deploy.release.plots.outputs import positions, subjects
from lora_deploy.release.plots.sizes import bars
from lora_deploy.release.plots.weights import heatmap, spectra

__all__ = ["bars", "heatmap", "positions", "ratios", "spectra", "subjects", "times"]
