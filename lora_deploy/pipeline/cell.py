"""One cell of a recipe: its stages, each from what the stage before it left on disk.

Promise: a stage whose inputs are unchanged does nothing again, because the content says so, never because a file
exists; a stage that is begun anywhere finds what earlier ones left, or says which is missing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ByteSize

from lora_deploy.artifact import cached_sha256
from lora_deploy.checkpoint import read_json
from lora_deploy.errors import RecipeError, Severity
from lora_deploy.evidence.dossier import EVIDENCE_NAME
from lora_deploy.evidence.verdict import Verdict
from lora_deploy.export.execute import Exported
from lora_deploy.export.extras import installed_version
from lora_deploy.export.record import read_record as read_export_record
from lora_deploy.hubs.open import fitting
from lora_deploy.merge.compose import versions
from lora_deploy.merge.execute import Merged
from lora_deploy.merge.plan import MergePlan
from lora_deploy.merge.progress import Progress
from lora_deploy.merge.record import RECORD_NAME, RecordedFile, read_record
from lora_deploy.pipeline import choices
from lora_deploy.pipeline.exporting import export
from lora_deploy.pipeline.journal import Journal, digest_of_inputs
from lora_deploy.pipeline.merging import execute, plan_binding, validate
from lora_deploy.pipeline.releasing import push, release
from lora_deploy.pipeline.verifying import require_pass, verify
from lora_deploy.recipe.cells import Cell, reference
from lora_deploy.recipe.model import ExportChoice, Recipe
from lora_deploy.recipe.stages import Stage
from lora_deploy.release.manifest import MANIFEST_NAME, Manifest, intact, read_manifest
from lora_deploy.release.parts import default_graphs
from lora_deploy.validate import Binding

_PROVERS = ("onnxruntime", "onnxruntime-gpu", "transformers", "peft", "diffusers")
"""Packages whose versions evidence depends on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What one stage came to."""

    figure: str
    """The number or the words that a person looks for."""
    verdict: Verdict = Verdict.PASS
    was_done: bool = False
    """Whether it was done before, from the same inputs."""


@dataclass(kw_only=True, eq=False)
class CellRun:
    """The stages of a cell, in one run."""

    recipe: Recipe
    recipe_folder: Path
    cell: Cell
    journal: Journal
    token: str | None = None
    progress: Progress | None = None

    @cached_property
    def binding(self) -> Binding:
        """Adapters on their base."""
        base = self.recipe.base
        return validate(
            [reference(path, self.recipe_folder) for path in self.cell.adapter.path],
            base=reference(base.path, self.recipe_folder) if base is not None else None,
            read_options=choices.read_options(self.cell),
            bind_options=choices.bind_options(self.recipe, self.cell),
            dequantize=base.dequantize if base is not None else False,
        )

    @cached_property
    def plan(self) -> MergePlan:
        """The merge, decided."""
        return plan_binding(
            self.binding,
            read_options=choices.read_options(self.cell),
            merge_options=choices.merge_options(self.recipe, self.cell),
        )

    def run(self, stage: Stage) -> Done:
        """Carry out one stage.

        Raises:
            LoraDeployError: It cannot be done, or proves something wrong.
        """
        stages = {
            Stage.VALIDATE: self._validate,
            Stage.MERGE: self._merge,
            Stage.EXPORT: self._export,
            Stage.EVIDENCE: self._prove,
            Stage.RELEASE: self._release,
            Stage.PUSH: self._push,
        }
        return stages[stage]()

    def _validate(self) -> Done:
        n_warnings = sum(finding.severity is Severity.WARN for finding in self.binding.findings)
        return Done(figure=f"{len(self.binding.updates)} tensors fit{_counted(n_warnings, 'warning')}")

    def _merge(self) -> Done:
        return self.after(execute(self.plan, self.cell.merged, progress=self.progress))

    def after(self, merged: Merged) -> Done:
        """Say what the merge came to, whoever carried it out."""
        kept = [t.survival for t in merged.record.tensors.values() if t.survival is not None]
        least = f", keeps {min(kept):.1%} of each update or more" if kept else ""
        return Done(figure=f"{_size(merged.record.artifacts)}{least}", was_done=merged.was_done)

    def _export(self) -> Done:
        self._require(self.cell.merged / RECORD_NAME, Stage.MERGE)
        made = [self._exported(choice) for choice in self.recipe.export]
        said = (f"{exported.root.name}: {_size(exported.record.artifacts)}" for exported in made)
        return Done(figure=", ".join(said), was_done=all(exported.was_done for exported in made))

    def _exported(self, choice: ExportChoice) -> Exported:
        return export(
            self.cell.merged,
            output=self.cell.merged / choice.name if choice.name else None,
            export_options=choices.export_options(choice),
            progress=self.progress,
        )

    def _prove(self) -> Done:
        self._require(self.cell.merged / RECORD_NAME, Stage.MERGE)
        path = self.cell.merged / EVIDENCE_NAME
        inputs = self._proven_from()
        if self.journal.has(Stage.EVIDENCE, inputs, path):
            return Done(figure=_said(read_json(path)), was_done=True)
        found = verify(
            self.cell.merged,
            options=choices.verify_options(self.recipe, self.recipe_folder),
            progress=self.progress,
        )
        if found.verdict is Verdict.FAIL:
            require_pass(found, self.cell.merged)
        if found.verdict is Verdict.PASS and path.is_file():
            self.journal.note(Stage.EVIDENCE, inputs, path)
            self.journal.write(self.cell.folder)
        return Done(figure=_said(found.to_json()), verdict=found.verdict)

    def _proven_from(self) -> str:
        """Digest everything that evidence depends on."""
        options = choices.verify_options(self.recipe, self.recipe_folder)
        return digest_of_inputs(
            {
                "made": self._made(),
                "options": asdict(options),
                "probes": _digest(options.probes),
                "versions": {name: installed_version(name) for name in _PROVERS},
            }
        )

    def _made(self) -> dict[str, Any]:
        """Name by digest what lies in the merged folder, and what would work on it."""
        record = read_record(self.cell.merged)
        graphs = {place.name: read_export_record(place) for place in default_graphs(self.cell.merged)}
        files = [self.cell.merged / file.path for file in record.artifacts]
        files += [self.cell.merged / name / file.path for name, graph in graphs.items() for file in graph.artifacts]
        return {
            "records": [record.digest, *(graph.digest for graph in graphs.values())],
            "files": {str(path.relative_to(self.cell.merged)): _digest(path) for path in files},
            "versions": versions(),
        }

    def _release(self) -> Done:
        self._require(self.cell.merged / RECORD_NAME, Stage.MERGE)
        inputs = self._released_from()
        path = self.cell.release / MANIFEST_NAME
        if self.journal.has(Stage.RELEASE, inputs, path) and intact(self.cell.release):
            return Done(figure=_summary(read_manifest(self.cell.release)), was_done=True)
        made = release(
            self.cell.merged,
            output=self.cell.release,
            options=choices.release_options(self.recipe, self.recipe_folder),
            progress=self.progress,
        )
        self.journal.note(Stage.RELEASE, inputs, path)
        self.journal.write(self.cell.folder)
        return Done(figure=_summary(made.manifest), was_done=made.was_done)

    def _released_from(self) -> str:
        """Digest everything that a release depends on."""
        options = choices.release_options(self.recipe, self.recipe_folder)
        texts = (options.card_template, options.sign_key, options.sign_certificate, self.cell.merged / EVIDENCE_NAME)
        return digest_of_inputs(
            {"made": self._made(), "options": asdict(options), "texts": [_digest(path) for path in texts]}
        )

    def _push(self) -> Done:
        self._require(self.cell.release / MANIFEST_NAME, Stage.RELEASE)
        options = choices.push_options(self.recipe, self.token)
        receipts = [
            push(self.cell.release, target, options=fitting(target, options), progress=self.progress)
            for target in self.cell.targets
        ]
        places = ", ".join(receipt.url for receipt in receipts)
        return Done(figure=places, was_done=not any(receipt.n_sent_bytes for receipt in receipts))

    def _require(self, path: Path, stage: Stage) -> None:
        if not path.is_file():
            raise RecipeError(f"{path}: is not there", hint=f"run --from {stage}", code="stage-missing")


def _size(files: Iterable[RecordedFile]) -> str:
    return ByteSize(sum(file.n_bytes for file in files)).human_readable(decimal=True, separator=" ")


def _digest(path: Path | None) -> str | None:
    return cached_sha256(path) if path is not None and path.is_file() else None


def _summary(manifest: Manifest) -> str:
    accepted = _counted(len(manifest.accepted), "accepted gap")
    return f"{len(manifest.files)} files, content {manifest.content.digest[:12]}{accepted}"


def _counted(n: int, what: str) -> str:
    return f", {n} {what}{'s' if n > 1 else ''}" if n else ""


def _said(evidence: dict[str, object]) -> str:
    """Name each check and its verdict."""
    reports = ((check, evidence[check]) for check in ("replay", "parity", "latency"))
    return ", ".join(f"{check} {report['verdict']}" for check, report in reports if isinstance(report, dict))
