"""Latency: does the merged graph take the time that the base's graph takes?

Two ways to know. The *proof*: the graphs are equal, operator for operator, shape for shape, format for format, so that
they compute the same with other numbers. The *measurement*: equivalence over fresh pairs of sessions. One of them must
hold. Where the proof holds and the measurement says *different*, the machine is the likelier culprit: the measurement
is repeated once, with fresh seeds, and only a second *different* is a failure.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_deploy.errors import EvidenceError, InconclusiveError
from lora_deploy.evidence.equivalence import ERROR_RATE, LOOKS, Equivalence, Interval, interval
from lora_deploy.evidence.graph_timing import Workload, loader
from lora_deploy.evidence.graphs import GraphFolder
from lora_deploy.evidence.load_cost import LoadCost, load_cost
from lora_deploy.evidence.probe import Probe
from lora_deploy.evidence.timing import AGAIN, BASE, CPU, MERGED, WALL, Load, Measurement, measure
from lora_deploy.evidence.verdict import Verdict
from lora_deploy.evidence.versions import versions
from lora_deploy.merge.budget import available_bytes
from lora_deploy.merge.progress import Progress, reporting

SEED = 7
CONTRAST = "unmerged"
_WARM_SECONDS = 0.5
"""An accelerator's clocks rise with work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What comparing the graphs showed."""

    is_equal: bool | None
    """None where nothing compared them."""
    reason: str
    """The digest they share, the first difference, or why there is no answer."""


Prove = Callable[[Path, Path], Proof]
"""Compares the graph files of base and merged."""


def prove_by(digest: Callable[[Path], str], first_difference: Callable[[Path, Path], str | None]) -> Prove:
    """Make a proof of a canonical digest, and of what names the first difference where digests differ."""

    def prove(base: Path, merged: Path) -> Proof:
        one, other = digest(base), digest(merged)
        if one == other:
            return Proof(is_equal=True, reason=f"canonical digest {one}")
        return Proof(is_equal=False, reason=first_difference(base, merged) or f"digests {one} and {other} differ")

    return prove


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyOptions:
    """How latency is measured."""

    bound: float = 0.03
    seconds: float = 60.0
    provider: str = "cpu"
    n_threads: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyReport:
    """The merged graph's time beside the base's."""

    verdict: Verdict
    reason: str = ""
    hint: str = ""
    proof: Proof
    measurements: tuple[Measurement, ...] = ()
    """One, or two where it had to be repeated."""
    costs: Mapping[str, LoadCost] = field(default_factory=dict)
    """Loading time and peak memory, each in a process of its own."""
    why_no_contrast: str = ""
    """Why the unmerged graph was not measured beside; empty where it was, or nobody asked for it."""
    options: LatencyOptions = LatencyOptions()
    workload: str = ""
    seconds: float = 0.0

    @property
    def measured(self) -> Equivalence | None:
        """What the last measurement said."""
        return self.measurements[-1].verdict if self.measurements else None

    def intervals(self, side: str, clock: str = CPU) -> dict[str, Interval]:
        """Where a side's ratios to the base lie, by phase, at 95 %."""
        if not self.measurements:
            return {}
        samples = self.measurements[-1].sample(side, clock)
        return {phase: interval(sample, 0.025) for phase, sample in samples.items() if len(sample) > 1}

    def to_json(self) -> dict[str, Any]:
        """The report for ``evidence.json``."""
        return {
            "verdict": self.verdict.value,
            "reason": self.reason,
            "hint": self.hint,
            "proof": asdict(self.proof),
            "measured": self.measured.value if self.measured else None,
            "bound": self.options.bound,
            "error_rate": ERROR_RATE,
            "looks_at": list(LOOKS),
            "workload": self.workload,
            "provider": self.options.provider,
            "n_threads": self.options.n_threads,
            "ratios": {
                side: {
                    clock: {phase: asdict(found) for phase, found in self.intervals(side, clock).items()}
                    for clock in (CPU, WALL)
                }
                for side in (MERGED, AGAIN, CONTRAST)
            },
            "measurements": [_measurement_to_json(found) for found in self.measurements],
            "why_no_contrast": self.why_no_contrast,
            "costs": {side: asdict(cost) for side, cost in self.costs.items()},
            "seconds": self.seconds,
            "versions": versions(),
            "machine": {"processor": platform.processor() or platform.machine(), "n_cores": os.cpu_count()},
        }


def _measurement_to_json(found: Measurement) -> dict[str, Any]:
    return {
        "seed": found.seed,
        "clock": found.clock,
        "n_rounds": found.n_rounds,
        "verdict": found.verdict.value,
        "ran_out": found.ran_out,
        "seconds": found.seconds,
        "looks": [entry.to_json() for entry in found.looks],
        "pairs": [asdict(pair) for pair in found.pairs],
    }


def check_latency(
    merged: GraphFolder,
    base: GraphFolder,
    config: Mapping[str, Any],
    options: LatencyOptions | None = None,
    *,
    prove: Prove | None = None,
    contrast: GraphFolder | None = None,
    workload: Probe | None = None,
    progress: Progress | None = None,
) -> LatencyReport:
    """Compare the time of two exports; ``contrast`` is a third, known to be slower, that shows what would be seen.

    ``workload`` is what both are fed; by default it is made after the configuration.

    Raises:
        RecipeError: No provider has that name.
    """
    options, started = options or LatencyOptions(), time.monotonic()
    proof = proof_of(merged, base, prove)
    work = Workload.of(config, provider=options.provider, n_threads=options.n_threads, given=workload)
    folders = {BASE: base, MERGED: merged, AGAIN: base}
    problem = _lacks_memory(folders.values())
    if problem:
        return _concluded(proof, (), options, work, {}, problem)
    why_no_contrast = ""
    if contrast is not None:
        why_no_contrast = _why_not_beside(contrast, folders.values(), work)
        folders |= {} if why_no_contrast else {CONTRAST: contrast}
    try:
        sides = {name: loader(folder, work) for name, folder in folders.items()}
        measurements = measure_twice(sides, options, is_proven=proof.is_equal is True, progress=progress)
        costs = {name: load_cost(folders[name], options.provider) for name in (BASE, MERGED)}
    except (EvidenceError, InconclusiveError) as error:
        return _concluded(proof, (), options, work, {}, error.message)
    report = _concluded(proof, measurements, options, work, costs, "")
    return replace(report, seconds=time.monotonic() - started, why_no_contrast=why_no_contrast)


def _lacks_memory(folders: Iterable[GraphFolder]) -> str:
    needed, available = 2 * sum(folder.n_bytes for folder in folders), available_bytes()
    if available is None or needed <= available:
        return ""
    return f"sessions side by side need {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are free"


def _why_not_beside(contrast: GraphFolder, folders: Iterable[GraphFolder], workload: Workload) -> str:
    """Say why a contrast cannot be measured beside the others: it must not spoil what can."""
    problem = _lacks_memory([*folders, contrast])
    if problem:
        return problem
    try:
        loader(contrast, workload)()
    except (EvidenceError, InconclusiveError) as error:
        return error.message
    return ""


def measure_twice(
    sides: Mapping[str, Load],
    options: LatencyOptions,
    *,
    is_proven: bool,
    progress: Progress | None = None,
) -> tuple[Measurement, ...]:
    """Measure; once more, with other seeds, where equal graphs seem different."""
    clock = CPU if options.provider == "cpu" else WALL  # elsewhere the CPU only waits
    found: list[Measurement] = []
    while not found or (len(found) < 2 and is_proven and found[0].verdict is Equivalence.DIFFERENT):
        with reporting(progress, "measuring latency", LOOKS[-1], "pairs of sessions") as advance:
            found.append(
                measure(
                    sides,
                    bound=options.bound,
                    seconds=options.seconds,
                    seed=SEED + len(found),
                    clock=clock,
                    warm_seconds=0.0 if clock == CPU else _WARM_SECONDS,
                    advance=advance,
                )
            )
    return tuple(found)


def conclude(proof: Proof, measured: Equivalence | None) -> tuple[Verdict, str]:
    """Weigh proof and measurement: either suffices, and what contradicts both fails."""
    if measured is Equivalence.DIFFERENT:
        return Verdict.FAIL, "the measured times differ" + (
            " twice, though the graphs are equal" if proof.is_equal else ""
        )
    if proof.is_equal:
        return Verdict.PASS, ""
    if measured is Equivalence.EQUAL:
        return Verdict.PASS, ""
    return Verdict.INCONCLUSIVE, f"no proof ({proof.reason}), and the measurement does not tell"


def _concluded(
    proof: Proof,
    measurements: tuple[Measurement, ...],
    options: LatencyOptions,
    workload: Workload,
    costs: Mapping[str, LoadCost],
    problem: str,
) -> LatencyReport:
    verdict, reason = conclude(proof, measurements[-1].verdict if measurements else None)
    is_open = verdict is Verdict.INCONCLUSIVE
    if problem and is_open:
        reason = f"no proof ({proof.reason}), and no measurement: {problem}"
    return LatencyReport(
        verdict=verdict,
        reason=reason,
        hint="give it more time (--seconds), on a quieter machine" if is_open and measurements else "",
        proof=proof,
        measurements=measurements,
        costs=costs,
        options=options,
        workload=workload.description,
    )


def proof_of(merged: GraphFolder, base: GraphFolder, prove: Prove | None) -> Proof:
    """Compare all graphs of two exports; the first that differs speaks."""
    if prove is None:
        return Proof(is_equal=None, reason="the graphs were not compared")
    if len(merged.files) != len(base.files):
        return Proof(is_equal=False, reason=f"{len(base.files)} graphs became {len(merged.files)}")
    proofs = [prove(one, other) for one, other in zip(base.files, merged.files, strict=True)]
    different = next((proof for proof in proofs if not proof.is_equal), None)
    return different or Proof(is_equal=True, reason="; ".join(dict.fromkeys(proof.reason for proof in proofs)))
