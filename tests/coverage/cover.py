"""One row of the coverage table: ``python -m tests.coverage.cover NAME FOLDER`` writes it as JSON to stdout.

An adapter that PEFT saved is merged, the merged checkpoint exported, and everything verified as ``lora-deploy verify``
does: the graphs' outputs beside those of PEFT's unmerged model. What is raised becomes the row's error, word for word.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import transformers
from peft import LoraConfig

from lora_deploy.errors import LoraDeployError
from lora_deploy.evidence.options import VerifyOptions
from lora_deploy.evidence.parity_report import ParityReport, SubjectReport
from lora_deploy.evidence.replay import ReplayReport
from lora_deploy.evidence.verdict import Check, Verdict
from lora_deploy.export.execute import Exported
from lora_deploy.merge.options import MergeOptions
from lora_deploy.pipeline import export, merge, verify
from tests.coverage.architectures import ARCHITECTURES, Architecture
from tests.peer.trained import MEMORY_BYTES, train


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
    seconds: float = 0.0
    """Of the export."""
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
    started = time.monotonic()
    try:
        trained = train(architecture.build(), config, folder)
        options = MergeOptions(dtype="float32", n_workers=1, memory_bytes=MEMORY_BYTES)
        merge(trained.adapter, base=trained.base, output=folder / "merged", merge_options=options)
        started = time.monotonic()
        exported = export(folder / "merged")
        row = replace(row, seconds=time.monotonic() - started, **_exported(exported))
        return _verified(row, folder / "merged")
    except LoraDeployError as error:
        message = error.message
    except Exception as error:  # noqa: BLE001 - whatever a library raises belongs into the table
        traceback.print_exc()
        message = f"{type(error).__name__}: {error}"
    return replace(row, seconds=row.seconds or time.monotonic() - started, error=" ".join(message.split()))


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
    return replace(row, parity=report.verdict.value, error=report.reason, **_figures(report))


def _figures(report: ParityReport) -> dict[str, object]:
    """The worst that a graph does."""
    entries = [entry for subject in report.subjects if _is_graph(subject) for entry in subject.overall]
    worst = max(entries, key=lambda entry: entry.mean, default=None)
    if worst is None:
        return {}
    effect = next((entry.mean for entry in report.effect if entry.output == worst.output), 0.0)
    return {"measure": f"{worst.measure} of {worst.output}", "divergence": worst.mean, "effect": effect}


def _is_graph(subject: SubjectReport) -> bool:
    return subject.name.startswith("onnx")


def main() -> None:
    """Print the row of the architecture that is named."""
    name, folder = sys.argv[1:]
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(1)
    torch.set_num_threads(1)
    row = cover(ARCHITECTURES[name], Path(folder))
    sys.stdout.write(json.dumps(asdict(row)) + "\n")


if __name__ == "__main__":
    main()
