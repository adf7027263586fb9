"""Plots show what they are given, in the page's colours; without figures there is none."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from lora_deploy.release import plots
from lora_deploy.release.report import effective_ranks

EVIDENCE = json.loads((Path(__file__).parents[2] / "fixtures/release/schema-1/evidence.json").read_text())


def texts(svg: str | None) -> list[str]:
    assert svg is not None
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def check_svg(svg: str | None) -> None:
    assert svg is not None
    assert svg.startswith("<svg role=")
    assert "currentColor" in svg
    assert not re.search(r"#0[1-4]0[1-4]0[1-4]", svg), "a stand-in colour is left"
    assert "<metadata" not in svg
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", svg)


def test_a_heatmap_names_every_module_once() -> None:
    values = {f"model.layers.{layer}.mlp.{name}.weight": 0.1 * layer for layer in range(3) for name in ("up", "down")}
    drawn = plots.heatmap(values, "sizes")
    check_svg(drawn)
    assert {"mlp.up", "mlp.down", "layer"} <= {*texts(drawn)}


def test_modules_of_two_towers_keep_what_tells_them_apart() -> None:
    values = {f"{tower}.layers.0.fc.weight": 1.0 for tower in ("vision", "text")}
    assert {"vision.layers.N.fc", "text.layers.N.fc"} <= {*texts(plots.heatmap(values, "sizes"))}


def test_latency_shows_every_side_and_phase_that_was_measured() -> None:
    latency = EVIDENCE["latency"]
    drawn = plots.ratios(latency["measurements"][-1], latency["ratios"], 0.03, "ratios")
    check_svg(drawn)
    assert {"merged, prefill", "merged, decode", "base again, prefill", "unmerged, decode"} <= {*texts(drawn)}
    drawn = plots.times(latency["measurements"][-1]["pairs"], "times")
    check_svg(drawn)
    assert {"base, prefill", "merged, prefill", "base, decode", "merged, decode"} <= {*texts(drawn)}


def test_outputs_show_every_subject_and_probe() -> None:
    subjects = EVIDENCE["parity"]["subjects"]
    assert {"merged checkpoint, reloaded", "onnx prefill"} <= {*texts(plots.subjects(subjects, "subjects"))}
    probes = {"a/logits": {"kl": [1e-5, 0.0]}, "b/logits": {"kl": [1e-4]}}
    drawn = plots.positions(probes, 1e-3, "positions")
    check_svg(drawn)
    assert {"a", "b", "allowed"} <= {*texts(drawn)}


def test_sizes_name_the_largest_files_in_one_unit() -> None:
    drawn = plots.bars([("model.safetensors", 4_000_000), ("empty", 0), *((f"f{k}", k) for k in range(1, 30))], "sizes")
    check_svg(drawn)
    assert "model.safetensors" in texts(drawn)
    assert "MB" in texts(drawn)
    assert "empty" not in texts(drawn)


@pytest.mark.parametrize("n_updates", [1, 2, 500])
def test_spectra_of_few_and_of_many_updates_are_drawn(n_updates: int) -> None:
    drawn = plots.spectra({f"w{k}": (3.0, 1.0) for k in range(n_updates)}, "spectra")
    check_svg(drawn)
    assert "singular value, from the largest" in texts(drawn)


def test_without_figures_there_is_no_plot() -> None:
    assert plots.heatmap({}, "") is None
    assert plots.heatmap({"embed.weight": 1.0}, "") is None
    assert plots.spectra({"a": (0.0,)}, "") is None
    assert plots.positions({}, None, "") is None
    assert plots.subjects([], "") is None
    assert plots.ratios({}, {}, 0.03, "") is None
    assert plots.times([], "") is None
    assert plots.bars([], "") is None


def test_the_same_figures_give_the_same_bytes() -> None:
    first, second = (plots.spectra(EVIDENCE["spectra"], "spectra") for _ in range(2))
    assert first == second


def test_effective_ranks_count_directions() -> None:
    evidence: dict[str, Any] = {"spectra": {"even": [2.0, 2.0, 2.0], "one": [5.0, 0.0], "none": [0.0]}}
    ranks = effective_ranks(evidence)
    assert ranks["even"] == pytest.approx(3)
    assert ranks["one"] == pytest.approx(1)
    assert "none" not in ranks
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_ranks({"spectra": {"x": [3, 1]}})["x"] == pytest.approx(math.exp(entropy))
