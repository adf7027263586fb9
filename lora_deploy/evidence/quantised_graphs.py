"""Find the quantised exports of a merged folder, and what each is compared with.

A quantised export is a folder ``onnx*`` in the merged one whose record says so. It has three companions: the same
export without quantisation, and both of the base. They are made for the time of the check, from graphs that are in the
cache, or found where they already are.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from lora_deploy.checkpoint import Checkpoint
from lora_deploy.errors import InputError
from lora_deploy.evidence.exported_base import exported_again, exported_base
from lora_deploy.evidence.graph_parity import Graphs
from lora_deploy.evidence.graphs import GraphFolder, find_graphs
from lora_deploy.export.extras import installed_version
from lora_deploy.export.record import ExportRecord, read_record
from lora_deploy.merge.plan import MergePlan
from lora_deploy.merge.progress import Progress

_PATTERN = "onnx*"


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantisedExport:
    """A quantised export as it was found."""

    graphs: GraphFolder
    record: ExportRecord

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.graphs.root.name

    @property
    def plain(self) -> ExportRecord:
        """What the record would say without quantisation."""
        options = {name: value for name, value in self.record.options.items() if name != "quantisation"}
        return self.record.model_copy(update={"options": options, "quantised": None})

    @property
    def other_quantiser(self) -> str | None:
        """Which onnxruntime quantised it, where that is another than the one here: it may pack other bytes."""
        for package in ("onnxruntime", "onnxruntime-gpu"):
            recorded, here = self.record.versions.get(package), installed_version(package)
            if here is not None and recorded != here:
                return f"quantised by {package} {recorded}, replayed by {here}"
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantisedGraphs:
    """A quantised export and all that it is compared with."""

    name: str
    quantised: Graphs
    """Of the merged model and of its base."""
    plain: Graphs | None
    """The same, not quantised; None where they cannot be had."""
    problem: str = ""
    """Why something cannot be had."""


def find_quantised(folder: Path) -> tuple[QuantisedExport, ...]:
    """Find them, by name."""
    found = []
    for path in sorted(folder.glob(_PATTERN)):
        record, graphs = record_in(path), find_graphs(path)
        if record is not None and graphs is not None and "quantisation" in record.options:
            found.append(QuantisedExport(graphs=graphs, record=record))
    return tuple(found)


def record_in(folder: Path) -> ExportRecord | None:
    """The export record of a folder; None where there is none of ours."""
    try:
        return read_record(folder)
    except InputError:
        return None  # another exporter's, or nobody's


class Companions:
    """Makes what quantised exports are compared with, each once."""

    def __init__(self, plan: MergePlan, merged: Checkpoint, stack: ExitStack, progress: Progress | None) -> None:
        """Make nothing yet; what is made is removed when ``stack`` closes."""
        self._plan = plan
        self._merged = merged
        self._stack = stack
        self._progress = progress
        self._plain: dict[str, Graphs | str] = {}

    def know(self, record: ExportRecord, graphs: Graphs) -> None:
        """Take plain graphs that are there already, of merged model and base, and were replayed."""
        self._plain[_key(record)] = graphs

    def of(self, export: QuantisedExport, provider: str) -> QuantisedGraphs:
        """Give everything that a quantised export is compared with, or say what cannot be had."""
        base = self._stack.enter_context(exported_base(self._plan, export.record, self._progress))
        plain = self._plain_of(export.plain, provider)
        problems = [problem for problem in (base, plain) if isinstance(problem, str)]
        return QuantisedGraphs(
            name=export.name,
            quantised=Graphs(
                merged=export.graphs, base=base if isinstance(base, GraphFolder) else None, provider=provider
            ),
            plain=plain if isinstance(plain, Graphs) else None,
            problem="; ".join(problems),
        )

    def _plain_of(self, record: ExportRecord, provider: str) -> Graphs | str:
        if _key(record) not in self._plain:
            merged = self._stack.enter_context(exported_again(self._merged, record, self._progress))
            base = self._stack.enter_context(exported_base(self._plan, record, self._progress))
            if isinstance(merged, str):
                self._plain[_key(record)] = merged
            elif isinstance(base, str):
                self._plain[_key(record)] = base
            else:
                self._plain[_key(record)] = Graphs(merged=merged, base=base, provider=provider)
        return self._plain[_key(record)]


def _key(record: ExportRecord) -> str:
    return repr(sorted(record.options.items()))
