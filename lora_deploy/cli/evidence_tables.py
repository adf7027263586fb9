"""What ``verify`` prints: one line a check, the figures that decided it, and what speaks against the folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_deploy.cli.numbers import format_number, format_seconds, format_size

if TYPE_CHECKING:
    from lora_deploy.cli.screen import Screen
    from lora_deploy.evidence.divergence import Divergence
    from lora_deploy.evidence.dossier import Evidence
    from lora_deploy.evidence.parity_report import ParityReport, SubjectReport
    from lora_deploy.evidence.quantised_report import QuantisedReport
    from lora_deploy.evidence.replay import ReplayReport
    from lora_deploy.evidence.tolerance import Power

N_SHOWN = 20
_N_POWERS = 4


def show_evidence(screen: Screen, found: Evidence, folder: Path) -> None:
    """Print every check."""
    screen.line(f"{folder}: {found.verdict.value}")
    rows = []
    for check, report in found.checks.items():
        said = report.to_json()
        reason = "" if said["verdict"] == "pass" else str(said.get("reason", ""))
        way = f", {said['way']}" if said.get("way", "whole model") != "whole model" else ""
        rows.append((check.value, f"{said['verdict']}{way}{f': {reason}' if reason else ''}"))
    screen.fields(rows)
    from lora_deploy.cli.latency_tables import latency_rows
    from lora_deploy.evidence.latency import LatencyReport
    from lora_deploy.evidence.parity_report import ParityReport
    from lora_deploy.evidence.replay import ReplayReport

    if isinstance(found.replay, ReplayReport):
        _show_replay(screen, found.replay)
    if isinstance(found.parity, ParityReport) and (found.parity.subjects or found.parity.quantised):
        _show_parity(screen, found.parity)
    if isinstance(found.latency, LatencyReport):
        screen.line("latency")
        screen.fields(latency_rows(found.latency))
    for name, report in found.quantised_latency.items():
        screen.line(f"latency of {name}: {report.verdict.value}")
        screen.fields(latency_rows(report))


def _show_replay(screen: Screen, report: ReplayReport) -> None:
    rate = report.n_bytes / max(report.seconds, 1e-9)
    screen.line("replay")
    screen.fields(
        [
            ("tolerance", report.tolerance),
            *((outcome.value, str(number)) for outcome, number in report.counts.items()),
            ("compared", f"{format_size(report.n_bytes)} in {format_seconds(report.seconds)}, {format_size(rate)}/s"),
        ]
    )
    for entry in report.faults[:N_SHOWN]:
        screen.line(f"  {entry.outcome.value:17}  {entry.name}{f': {entry.message}' if entry.message else ''}")
    if len(report.faults) > N_SHOWN:
        screen.line(f"  … and {len(report.faults) - N_SHOWN} more (--json lists all)")


def _show_parity(screen: Screen, report: ParityReport) -> None:
    screen.line("parity")
    n_positions = max((entry.n_positions for entry in report.effect), default=0)
    screen.fields(
        [
            ("reference", report.reference),
            ("probes", f"{len(report.probes)}, {n_positions} positions, in {format_seconds(report.seconds)}"),
            *(
                (f"effect on {power.output}", _power_line(power.effect, power.ratio))
                for power in _weakest(report.power)
            ),
            *(
                (f"picture, {picture.name}", f"{100 * picture.relative_l2:.3g} % off the unmerged one's")
                for picture in report.pictures
                if picture.relative_l2 is not None and picture.name != "unmerged"
            ),
            *(("note", note) for note in report.notes),
        ]
    )
    shown = sorted(report.subjects, key=_tightness, reverse=True)[:N_SHOWN]
    left_out = len(report.subjects) - len(shown)
    for subject in report.subjects if not left_out else shown:
        screen.line(f"  {subject.name}: {subject.verdict.value}")
        for line in _figures(subject):
            screen.line(f"    {line}")
    for quantised in report.quantised:
        _show_quantised(screen, quantised)

    if left_out:
        screen.line(f"  … and {left_out} more, further within their tolerance (--json lists all)")


def _weakest(powers: Sequence[Power]) -> Sequence[Power]:
    """Of many parts, the one whose adapter shows least."""
    return powers if len(powers) <= _N_POWERS else sorted(powers, key=lambda power: power.ratio)[:1]


def _tightness(subject: SubjectReport) -> tuple[bool, float]:
    """What does not pass comes first, then what uses most of its tolerance."""
    pairs = zip(subject.overall, subject.tolerances, strict=True)
    used = max((found.mean / bound.mean for found, bound in pairs if bound.mean), default=0.0)
    return subject.verdict.value != "pass", used


def _power_line(effect: float, ratio: float) -> str:
    return f"{format_number(effect)}, {format_number(ratio)} times the tolerance"


def _figures(subject: SubjectReport) -> Iterator[str]:
    for found, bound in zip(subject.overall, subject.tolerances, strict=True):
        top = "" if found.top1 is None else f", top-1 {found.top1:.1%}"
        yield (
            f"{found.output}: {found.measure} mean {format_number(found.mean)} (allowed {format_number(bound.mean)}), "
            f"max {format_number(found.largest)} (allowed {format_number(bound.largest)}){top}, "
            f"largest difference {format_number(found.max_abs)}"
        )
    if "placement" in subject.facts:
        yield str(subject.facts["placement"])
    if subject.greedy:
        turned = [entry for entry in subject.greedy if entry.first_difference is not None]
        yield (
            f"greedy decoding: {len(subject.greedy) - len(turned)} of {len(subject.greedy)} continuations the same"
            + ("".join(f"; token {entry.first_difference} turned at a lead of {entry.margin:.2g}" for entry in turned))
        )


def _show_quantised(screen: Screen, report: QuantisedReport) -> None:
    sizes = report.n_bytes
    beside = f", of {format_size(sizes['plain'])}" if "plain" in sizes else ""
    screen.line(f"  {report.name}: {report.verdict.value}, {format_size(sizes['quantised'])}{beside}")
    for loss in report.losses:
        screen.line(f"    {loss.run}, {loss.output}: {loss.whole.measure} from unmerged {_mean_and_most(loss.whole)}")
        for name, found in (
            ("merge", loss.merge),
            ("export", loss.export),
            ("quantise", loss.quantise),
            ("the base's quantise", loss.base),
            ("the adapter's effect", loss.effect),
        ):
            screen.line(f"      {name:20}  {_mean_and_most(found)}")
        left = loss.survival
        screen.line(
            f"      {'what is left of it':20}  {left.share:.0%}: "
            f"cosine {left.cosine:.3f}, norm ratio {format_number(left.norm_ratio)}"
        )


def _mean_and_most(found: Divergence) -> str:
    top = "" if found.top1 is None else f", top-1 {found.top1:.1%}"
    return f"mean {format_number(found.mean)}, max {format_number(found.largest)}{top}"
