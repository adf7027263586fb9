"""The report, ``report.html``: verdict first, then plots, then the tables behind them; one file that fetches nothing.

Promise: everything in it comes from the records and the evidence; text is escaped; never the manifest's digest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from lora_deploy.release.card import CardFacts, figures, public_name
from lora_deploy.release.plots import bars, heatmap, positions, ratios, spectra, subjects, times

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
    parity, latency = evidence.get("parity") or {}, evidence.get("latency") or {}
    ranks = effective_ranks(evidence)
    adapted = {name: t for name, t in facts.tensors.items() if t.delta_norm is not None}
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
        "pictures": parity.get("pictures") or [],
        "plots": [plot for plot in _plots(facts, sizes) if plot is not None],
        "tensors": [(name, tensor, ranks.get(name)) for name, tensor in list(adapted.items())[:_N_SHOWN]],
        "n_more": max(0, len(adapted) - _N_SHOWN),
        "subjects": parity.get("subjects") or [],
        "intervals": list(_intervals(latency.get("ratios") or {})),
        "costs": latency.get("costs") or {},
        "sizes": [(path, _size(n_bytes)) for path, n_bytes in sizes],
        "versions": facts.record.versions,
    }


def _intervals(ratios_by_side: Mapping[str, Any]) -> Iterator[tuple[str, str, str, Mapping[str, Any]]]:
    for side, clocks in ratios_by_side.items():
        for clock, phases in clocks.items():
            for phase, found in phases.items():
                yield side, clock, phase, found


def effective_ranks(evidence: Mapping[str, Any]) -> dict[str, float]:
    """Give exp(entropy) of the singular values of every update: how many directions it really uses.

    Source: Roy and Vetterli 2007, definition 1.
    """
    ranks = {}
    for name, values in (evidence.get("spectra") or {}).items():
        whole = math.fsum(values)
        shares = [value / whole for value in values if value > 0]
        if shares:
            ranks[name] = math.exp(-math.fsum(share * math.log(share) for share in shares))
    return ranks


def _overall(verdicts: Mapping[str, str]) -> str:
    return "proven" if set(verdicts.values()) == {"pass"} else "released with accepted gaps"


def _plots(facts: CardFacts, sizes: Sequence[tuple[str, int]]) -> list[Plot | None]:
    evidence = facts.evidence
    parity, latency = evidence.get("parity") or {}, evidence.get("latency") or {}
    return [
        *_of_weights(facts),
        *_of_outputs(parity.get("subjects") or []),
        *_of_latency(latency),
        _plot("Sizes", bars(sizes, "sizes of the largest files"), "The largest files of the release."),
    ]


def _of_weights(facts: CardFacts) -> Iterator[Plot | None]:
    tensors, spectra_of = facts.tensors.items(), facts.evidence.get("spectra") or {}
    sizes = {name: tensor.ratio for name, tensor in tensors if tensor.ratio is not None}
    kept = {name: tensor.survival for name, tensor in tensors if tensor.survival is not None}
    yield _plot(
        "Size of the update",
        heatmap(sizes, "size of the update, by layer and module"),
        "‖Δ‖ / ‖W‖ of every adapted tensor.",
    )
    yield _plot(
        "Survival",
        heatmap(kept, "survival, by layer and module"),
        "The part of the update that the stored format kept, at most 1.",
    )
    yield _plot(
        "Effective ranks",
        heatmap(effective_ranks(facts.evidence), "effective ranks, by layer and module"),
        "How many directions each update really uses: the exponential of the entropy of its singular values.",
    )
    yield _plot(
        "Spectra of the updates",
        spectra(spectra_of, "singular values of the updates"),
        "Singular values of Δ, a line a tensor. A steep fall says that fewer ranks would have done.",
    )


def _of_outputs(found: Sequence[Mapping[str, Any]]) -> Iterator[Plot | None]:
    said = "Dots left of their bars pass: KL divergence where outputs are logits, else relative distance."
    yield _plot("Outputs beside the unmerged model", subjects(found, "distance of every subject"), said)
    for subject in found:
        bound = next((float(entry["largest"]) for entry in subject.get("tolerances") or []), None)
        title = f"Outputs: {subject['name']}"
        said = "Distance to the unmerged model at every position, and the most that is allowed."
        yield _plot(title, positions(subject.get("probes") or {}, bound, title), said)


def _of_latency(latency: Mapping[str, Any]) -> Iterator[Plot | None]:
    for measurement in (latency.get("measurements") or [])[-1:]:
        bound = float(latency.get("bound") or 0.03)
        said = "Fresh pairs of sessions; the base beside itself shows the noise, the unmerged graph what could be seen."
        drawn = ratios(measurement, latency.get("ratios") or {}, bound, "time relative to the base")
        yield _plot("Latency, relative to the base", drawn, said)
        said = "Boxes hold the middle half of the sessions, the bar in them their median."
        yield _plot("Times of base and merged", times(measurement.get("pairs") or [], "times of base and merged"), said)


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
        return f"{value:.4g}"
    return "–" if value is None else str(value)
