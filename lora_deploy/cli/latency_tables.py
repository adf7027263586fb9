"""How times are printed: what one side takes, and where ratios lie."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from lora_deploy.cli.numbers import format_seconds, format_size

if TYPE_CHECKING:
    from lora_deploy.cli.screen import Screen
    from lora_deploy.evidence.latency import LatencyReport


def show_bench(screen: Screen, report: LatencyReport, folder: Path, against: Path | None) -> None:
    """Print the outcome of ``bench``."""
    if against is None:
        screen.line(f"{folder}: {report.workload}")
        screen.fields([("time", ", ".join(_times(report, "base"))), *_costs(report, "base")])
        return
    said = report.measured.value if report.measured else report.reason
    screen.line(f"{folder} (merged) beside {against} (base): {said}, within ±{report.options.bound:.1%} or not")
    screen.fields(latency_rows(report))


def latency_rows(report: LatencyReport) -> Iterator[tuple[str, str]]:
    """Give names and figures of a report."""
    if report.proof.is_equal is not None:
        yield "proof", f"{'graphs are equal' if report.proof.is_equal else 'graphs differ'}: {report.proof.reason}"
    if report.measurements:
        last = report.measurements[-1]
        repeated = ", measured twice" if len(report.measurements) > 1 else ""
        pairs = f"{len(last.pairs)} pairs of sessions, {last.n_rounds} rounds each"
        yield "measured", f"{last.verdict.value}: {pairs}, in {format_seconds(last.seconds)}{repeated}"
        for side in dict.fromkeys(side for pair in last.pairs for side in pair.medians):
            yield side, ", ".join(_times(report, side))
            for phase, found in report.intervals(side).items():
                yield "", f"{phase} / base: {found.ratio:.3f} [{found.low:.3f}, {found.high:.3f}]"
        if report.why_no_contrast:
            yield "unmerged", f"not measured: {report.why_no_contrast}"
    for side in report.costs:
        yield from _costs(report, side)


def _costs(report: LatencyReport, side: str) -> Iterator[tuple[str, str]]:
    cost = report.costs[side]
    yield f"{side} loads", f"in {format_seconds(cost.load_seconds)}, peak memory {format_size(cost.peak_bytes)}"


def _times(report: LatencyReport, side: str) -> Iterator[str]:
    pairs = [pair.medians[side] for pair in report.measurements[-1].pairs if side in pair.medians]
    for phase in pairs[0]:
        yield f"{phase} {1000 * median(pair[phase] for pair in pairs):.3g} ms"
