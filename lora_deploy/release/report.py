"""The report, ``report.html``: verdict first, then plots, then the tables behind them; one file that fetches nothing.

Promise: everything in it comes from the records and the evidence; text is escaped; never the manifest's digest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from lora_deploy.release.card import CardFacts, figures, public_name
from lora_deploy.release.plots import heatmap, positions, ratios, spectra

REPORT_NAME = "report.html"
_N_SHOWN = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """A plot and what it shows."""

    title: str
    svg: str
    said: str


def report_html(facts: CardFacts, sizes: Sequence[tuple[str, int]]) -> str:
    """Write the report; ``sizes`` are the release's files and their bytes.

    Raises:
        ReleaseError: matplotlib or jinja2 is not installed.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(undefined=StrictUndefined, autoescape=True, keep_trailing_newline=True)
    environment.filters["svg"] = Markup  # our own plots, whose text matplotlib has escaped
    environment.filters["number"] = _number
    source = files("lora_deploy.release").joinpath("report.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(source).render(_names(facts, sizes))


def _names(facts: CardFacts, sizes: Sequence[tuple[str, int]]) -> dict[str, Any]:
    evidence = facts.evidence
    adapted = {name: t for name, t in facts.record.tensors.items() if t.delta_norm is not None}
    return {
        "name": facts.name,
        "base": public_name(facts.record),
        "verdict": _overall(facts.verdicts),
        "checks": [
            {"check": check, "verdict": verdict, "figures": figures(check, evidence)}
            for check, verdict in facts.verdicts.items()
        ],
        "accepted": facts.accepted,
        "findings": facts.findings,
        "plots": [plot for plot in _plots(facts) if plot is not None],
        "tensors": list(adapted.items())[:_N_SHOWN],
        "n_more": max(0, len(adapted) - _N_SHOWN),
        "subjects": (evidence.get("parity") or {}).get("subjects") or [],
        "ratios": (evidence.get("latency") or {}).get("ratios") or {},
        "costs": (evidence.get("latency") or {}).get("costs") or {},
        "sizes": [(path, _size(n_bytes)) for path, n_bytes in sizes],
        "versions": facts.record.versions,
    }


def _overall(verdicts: Mapping[str, str]) -> str:
    return "proven" if set(verdicts.values()) == {"pass"} else "released with accepted gaps"


def _plots(facts: CardFacts) -> list[Plot | None]:
    evidence, tensors = facts.evidence, facts.record.tensors
    parity, latency = evidence.get("parity") or {}, evidence.get("latency") or {}
    found = [
        _plot(
            "Size of the update",
            heatmap(tensors, "ratio", "size of the update, by layer and module"),
            "‖Δ‖ / ‖W‖ of every adapted tensor.",
        ),
        _plot(
            "Survival",
            heatmap(tensors, "survival", "survival, by layer and module"),
            "The part of the update that the stored format kept, at most 1.",
        ),
        _plot(
            "Spectra of the updates",
            spectra(evidence.get("spectra") or {}, "singular values of the updates"),
            "Singular values of Δ, a line a tensor. A steep fall says that fewer ranks would have done.",
        ),
    ]
    for subject in parity.get("subjects") or []:
        bound = next((float(entry["largest"]) for entry in subject.get("tolerances") or []), None)
        title = f"Outputs: {subject['name']}"
        said = "Distance to the unmerged model at every position, and the most that is allowed."
        found.append(_plot(title, positions(subject.get("probes") or {}, bound, title), said))
    for measurement in (latency.get("measurements") or [])[-1:]:
        said = "Fresh pairs of sessions, base beside merged; the base beside itself shows the noise."
        bound = float(latency.get("bound") or 0.03)
        found.append(_plot("Latency", ratios(measurement, bound, "time relative to the base"), said))
    return found


def _plot(title: str, svg: str | None, said: str) -> Plot | None:
    return Plot(title=title, svg=svg, said=said) if svg is not None else None


def _size(n_bytes: int) -> str:
    """In decimal units, as everywhere."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= factor:
            return f"{n_bytes / factor:.3g} {unit}"
    return f"{n_bytes} bytes"


def _number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return "–" if value is None else str(value)
