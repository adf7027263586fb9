"""Everything that was checked about a merged folder, as one value and as ``evidence.json``.

Promise: what failed fails the whole; what could not be checked makes it inconclusive; what has no subject, or was left
out by the user, is said and counts for nothing, and nothing alone is no pass.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_deploy.errors import MergeError
from lora_deploy.evidence.latency import LatencyReport
from lora_deploy.evidence.outcome import NotApplicable
from lora_deploy.evidence.parity_report import ParityReport
from lora_deploy.evidence.replay import ReplayReport
from lora_deploy.evidence.verdict import Check, Verdict
from lora_deploy.export.record import RECORD_NAME as EXPORT_RECORD
from lora_deploy.merge.output import write_text
from lora_deploy.merge.record import RECORD_NAME

EVIDENCE_NAME = "evidence.json"
SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """The reports of all checks."""

    replay: ReplayReport | NotApplicable
    parity: ParityReport | NotApplicable
    latency: LatencyReport | NotApplicable
    quantised_latency: Mapping[str, LatencyReport] = field(default_factory=dict)
    """Of quantised exports, by folder: merged beside base, both quantised."""
    files: Mapping[str, str] = field(default_factory=dict)
    """What was checked: sha256 by path of the recorded weights and graphs, as they were found."""
    spectra: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Singular values of low-rank updates, by tensor, from the largest."""

    @property
    def reports(self) -> tuple[tuple[Check, ReplayReport | ParityReport | LatencyReport], ...]:
        """Everything that was checked, with what it was checked for."""
        said = (*self.checks.items(), *((Check.LATENCY, report) for report in self.quantised_latency.values()))
        return tuple((check, report) for check, report in said if not isinstance(report, NotApplicable))

    @property
    def checks(self) -> dict[Check, ReplayReport | ParityReport | LatencyReport | NotApplicable]:
        """Reports by check, in the order they were made."""
        return {Check.REPLAY: self.replay, Check.PARITY: self.parity, Check.LATENCY: self.latency}

    @property
    def verdict(self) -> Verdict:
        """Sum up."""
        verdicts = {report.verdict for _, report in self.reports}
        for verdict in (Verdict.FAIL, Verdict.INCONCLUSIVE, Verdict.PASS):
            if verdict in verdicts:
                return verdict
        return Verdict.INCONCLUSIVE

    def to_json(self) -> dict[str, Any]:
        """The whole of ``evidence.json``; infinities and NaN are null."""
        reports = {check.value: report.to_json() for check, report in self.checks.items()}
        quantised = {name: report.to_json() for name, report in self.quantised_latency.items()}
        if quantised:
            reports["quantised_latency"] = quantised
        document: dict[str, Any] = _plain(
            {
                "schema": SCHEMA,
                "verdict": self.verdict.value,
                "files": dict(self.files),
                "spectra": dict(self.spectra),
                **reports,
            }
        )
        return document

    def write(self, folder: Path) -> Path | None:
        """Write ``evidence.json`` into a folder of ours, whole or not at all; None where that cannot be."""
        if not any((folder / name).is_file() for name in (RECORD_NAME, EXPORT_RECORD)):
            return None
        text = json.dumps(self.to_json(), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
        try:
            write_text(folder / EVIDENCE_NAME, text)
        except MergeError:
            return None  # a folder that is read-only, or a full disk: the verdict does not depend on it
        return folder / EVIDENCE_NAME


def _plain(value: Any) -> Any:  # noqa: ANN401 - JSON
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
