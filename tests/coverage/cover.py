"""One row of the coverage table.

An adapter that PEFT saved is merged, the merged checkpoint exported, and everything verified as ``lora-deploy verify``
does: the graphs' outputs beside those of PEFT's unmerged model. What is raised becomes the row's error, word for word.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from peft import LoraConfig

from lora_deploy.errors import LoraDeployError
from lora_deploy.evidence.options import VerifyOptions
from lora_deploy.evidence.parity_report import ParityReport, SubjectReport
from lora_deploy.evidence.replay import ReplayReport
from lora_deploy.evidence.tolerance import EXPORT_MULTIPLE
from lora_deploy.evidence.verdict import Check, Verdict
from lora_deploy.export.execute import Exported
from lora_deploy.merge.options import MergeOptions
from lora_deploy.pipeline import export, merge, verify
from tests.coverage.architectures import Architecture
from tests.peer.trained import MEMORY_BYTES, train

MOST_OF_EFFECT = 1e-6
"""Float32 is nearer to the reference than this part of the adapter's effect, whatever tolerance an output was given."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What is told of one architecture."""

    name: str
    cls: str
    graphs: tuple[str, ...] = ()
    """Components that were exported; empty where none could be."""
    is_fused: bool = False
    """Whether onnxruntime's fused kernels serve every graph."""
    parity: str = ""
    """The verdict of ``verify``."""
    measure: str = ""
    """Which divergence decided, and of which output."""
    divergence: float = 0.0
    """Largest mean divergence that any graph has from PEFT's unmerged model."""
    effect: float = 0.0
    """The adapter's own, in the same measure."""
    excess: float = 0.0
    """How many times the divergence of float32 arithmetic the base's own graph has from the base, at most."""
    seconds: float = 0.0
    """Of the processor, for the first export of a base."""
    error: str = ""
    """Word for word."""

    @property
    def is_good(self) -> bool:
        """Whether the architecture is exported and proven."""
        return not self.error and self.parity == Verdict.PASS.value


def cover(architecture: Architecture, folder: Path) -> Row:
    """Adapt, merge, export and verify one architecture."""
    row = Row(name=architecture.name, cls=architecture.cls)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=architecture.targets if isinstance(architecture.targets, str) else list(architecture.targets),
        modules_to_save=list(architecture.saved) or None,
        init_lora_weights=False,
    )
    started = time.process_time()
    try:
        trained = train(architecture.build(), config, folder, save_embedding_layers=False)
        options = MergeOptions(dtype="float32", n_workers=1, memory_bytes=MEMORY_BYTES)
        merge(trained.adapter, base=trained.base, output=folder / "merged", merge_options=options)
        started = time.process_time()
        exported = export(folder / "merged")
        row = replace(row, seconds=time.process_time() - started, **_exported(exported))
        return _verified(row, folder / "merged")
    except LoraDeployError as error:
        message = error.message
    except Exception as error:  # noqa: BLE001 - whatever a library raises belongs into the table
        traceback.print_exc()
        message = f"{type(error).__name__}: {error}"
    row = replace(row, seconds=row.seconds or time.process_time() - started)
    return replace(row, error=" ".join(message.replace(f"{folder}/", "").split()))


def _exported(exported: Exported) -> dict[str, object]:
    codes = {finding.code for finding in exported.record.findings}
    return {"graphs": tuple(exported.record.graphs), "is_fused": "unfused" not in codes}


def _verified(row: Row, folder: Path) -> Row:
    found = verify(folder, options=VerifyOptions(only=(Check.REPLAY, Check.PARITY)))
    assert isinstance(found.replay, ReplayReport)
    if found.replay.verdict is not Verdict.PASS:
        return replace(row, error=f"replay: {[entry.message for entry in found.replay.faults]}")
    report = found.parity
    if not isinstance(report, ParityReport):
        return replace(row, parity="not applicable", error=report.reason)
    error = report.reason.replace(f"{folder}/", "")
    row = replace(row, parity=report.verdict.value, error=error, **_figures(report))
    if row.error or row.divergence <= MOST_OF_EFFECT * row.effect:
        return row
    told = f"the {row.measure} is {row.divergence:.2g} where the adapter's effect is {row.effect:.2g}"
    return replace(row, error=f"the graph is not the model: {told}")


def _figures(report: ParityReport) -> dict[str, object]:
    """The worst that a graph does."""
    entries = [entry for subject in report.subjects if _is_graph(subject) for entry in subject.overall]
    worst = max(entries, key=lambda entry: entry.mean, default=None)
    if worst is None:
        return {}
    effect = next((entry.mean for entry in report.effect if entry.output == worst.output), 0.0)
    return {
        "measure": f"{worst.measure} of {worst.output}",
        "divergence": worst.mean,
        "effect": effect,
        "excess": max(_excesses(report), default=0.0),
    }


def _excesses(report: ParityReport) -> Iterator[float]:
    for subject in report.subjects:
        limits = subject.facts.get("export_limits", {})
        for bound in subject.tolerances:
            for share in bound.shares:
                if share.name == "export" and bound.output in limits:
                    yield EXPORT_MULTIPLE * share.mean / limits[bound.output]


def _is_graph(subject: SubjectReport) -> bool:
    return subject.name.startswith("onnx")
