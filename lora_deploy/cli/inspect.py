"""``lora-deploy inspect``: what an adapter holds, without its base."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from lora_deploy.adapters.interface import ReadOptions
from lora_deploy.cli.numbers import format_number, format_size
from lora_deploy.cli.options import chosen, output_options, read_options
from lora_deploy.cli.screen import Screen

if TYPE_CHECKING:
    from lora_deploy.inspection import Inspection, ModuleReport


@click.command(short_help="Show what an adapter holds.")
@click.argument("adapter")
@read_options
@output_options
@click.pass_obj
def inspect(screen: Screen, /, adapter: str, **choices: Any) -> None:  # noqa: ANN401 - options by name
    """Show what ADAPTER holds: a folder, a weights file or a hub id. No base is needed.

    One row for each update: rank, scale, the Frobenius norms of A, B and Δ = s·B·A, and Δ's effective rank, which is
    exp(entropy of its normalised singular values): between 1 and the rank, 0 for an update that was never trained. Then
    where the scale came from, and whatever is unusual.
    """
    from lora_deploy import pipeline

    inspection = pipeline.inspect(adapter, read_options=chosen(ReadOptions, choices))
    screen.publish(document(inspection))
    screen.line(str(inspection.path))
    screen.fields(_summary(inspection))
    screen.line()
    screen.table(*_table(inspection))
    if inspection.findings:
        screen.line()
        screen.findings(inspection.findings)


def document(inspection: Inspection) -> dict[str, object]:
    """Give what ``--json`` prints."""
    return {
        "adapter": str(inspection.path),
        "name": inspection.name,
        "format": inspection.format,
        "tuner": inspection.tuner,
        "n_bytes": inspection.n_bytes,
        "sha256": inspection.sha256,
        "trained_with": inspection.trained_with,
        "base": inspection.base_hint,
        "modules": [_module_document(module) for module in inspection.modules],
        "findings": inspection.findings,
    }


def _module_document(module: ModuleReport) -> dict[str, object]:
    measured = module.measured
    return {
        "target": module.target,
        "component": module.component,
        "kind": module.kind,
        "method": module.method or None,
        "keys": module.keys,
        "shape": measured.shape,
        "dtype": measured.dtype,
        "rank": measured.rank,
        "scale": measured.scale.value if measured.scale else None,
        "scale_source": measured.scale.source if measured.scale else None,
        "down_norm": measured.down_norm,
        "up_norm": measured.up_norm,
        "delta_norm": measured.delta_norm,
        "effective_rank": measured.effective_rank,
        "is_untrained": measured.is_untrained,
    }


def _summary(inspection: Inspection) -> Iterator[tuple[str, str]]:
    modules = inspection.modules
    tuner = f" {inspection.tuner}" if inspection.tuner else ""
    yield "format", f"{inspection.format}{tuner}, {format_size(inspection.n_bytes)}"
    yield "sha256", inspection.sha256
    hint = inspection.base_hint
    revision = f"@{hint.revision}" if hint.revision else ""
    yield "base", f"{hint.name}{revision}" if hint.name else "not named"
    if inspection.trained_with:
        yield "trained", inspection.trained_with
    if methods := Counter(module.method for module in modules if module.method):
        yield "methods", _counted(methods)
    yield "updates", _counted(Counter(module.kind for module in modules))
    yield "dtype", _counted(Counter(module.measured.dtype for module in modules))
    ranks = Counter(module.measured.rank for module in modules if module.measured.rank is not None)
    if ranks:
        yield "rank", _counted(Counter({str(rank): n for rank, n in sorted(ranks.items())}))
    scales = Counter(
        f"{module.measured.scale.value:.6g} = {module.measured.scale.source}"
        for module in modules
        if module.measured.scale
    )
    for i, (scale, number) in enumerate(scales.items()):
        yield "scale" if i == 0 else "", f"{scale} ({number} of {len(modules)})" if len(scales) > 1 else scale


def _counted(counts: Counter[str]) -> str:
    if len(counts) == 1:
        ((name, number),) = counts.items()
        return f"{name} ({number})"
    return ", ".join(f"{number} × {name}" for name, number in counts.items())


_NOTHING = format_number(None)
"""What stands where a kind of update has no such figure; a column of nothing else is left out."""
_COLUMNS: tuple[tuple[str, bool, Callable[[ModuleReport], str]], ...] = (
    ("update of", True, lambda module: f"{module.component}/{module.target}" if module.component else module.target),
    ("kind", False, lambda module: module.kind),
    ("dtype", False, lambda module: module.measured.dtype),
    ("rank", False, lambda module: "–" if module.measured.rank is None else str(module.measured.rank)),
    ("scale", False, lambda module: format_number(module.measured.scale.value if module.measured.scale else None)),
    ("‖A‖", True, lambda module: format_number(module.measured.down_norm)),
    ("‖B‖", True, lambda module: format_number(module.measured.up_norm)),
    ("‖Δ‖", True, lambda module: format_number(module.measured.delta_norm)),
    ("eff. rank", True, lambda module: format_number(module.measured.effective_rank)),
)
"""Header, whether the column is there even when all its cells are equal, and a module's cell."""


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key under which layer 2 comes before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _table(inspection: Inspection) -> tuple[list[str], list[list[str]]]:
    """Build the rows; what is the same for all of several modules stands in the summary only."""
    modules = sorted(inspection.modules, key=lambda module: (module.component or "", _natural(module.target)))
    cells = {header: {cell(module) for module in modules} for header, _, cell in _COLUMNS}
    columns = [
        (header, cell)
        for header, always, cell in _COLUMNS
        if (always or len(cells[header]) > 1) and (cells[header] != {_NOTHING} or not modules)
    ]
    return [header for header, _ in columns], [[cell(module) for _, cell in columns] for module in modules]
