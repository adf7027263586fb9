"""Put a release together: weights, graphs, evidence, card, manifest; in one folder that appears whole or not at all.

Promise: nothing enters that its own record does not name with this digest; nothing that failed its check enters. Large
files are shared with their origin where the file system can (reflink, else a hard link), never linked by name.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lora_deploy.artifact import cached_sha256, remember_sha256
from lora_deploy.checkpoint import read_json
from lora_deploy.errors import DigestMismatchError, LoraDeployError, OutputExistsError, RecipeError, ReleaseError
from lora_deploy.evidence.dossier import EVIDENCE_NAME
from lora_deploy.export.record import RECORD_NAME as EXPORT_RECORD
from lora_deploy.export.record import ExportRecord
from lora_deploy.export.record import read_record as read_export
from lora_deploy.merge.output import WORK_FOLDER, locked, publish, remove, tidy
from lora_deploy.merge.progress import Progress, reporting
from lora_deploy.merge.record import RECORD_NAME, MergeRecord, RecordedFile, RecordedFinding, read_record
from lora_deploy.release.card import CARD_NAME, CardFacts, card_text, public_name
from lora_deploy.release.gate import Passage, pass_gate, read_evidence
from lora_deploy.release.licence import Licence, card_metadata, licence_of
from lora_deploy.release.manifest import (
    MANIFEST_NAME,
    SCHEMA,
    Content,
    EvidencePart,
    Manifest,
    ReleasedAdapter,
    ReleasedBase,
    canonical_json,
    check_listing,
    read_manifest,
)
from lora_deploy.release.options import ReleaseOptions
from lora_deploy.release.provenance import BOM_NAME, PROVENANCE_NAME, bill_of_materials, provenance
from lora_deploy.release.report import REPORT_NAME, report_html
from lora_deploy.release.sign import sign
from lora_deploy.safetensors_file import write_file

_FICLONE = 0x40049409
"""Linux: make a file share another's blocks until one of them is written."""
_GRAPHS = "onnx"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Release:
    """A finished release."""

    root: Path
    manifest: Manifest
    was_done: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Parts:
    """Everything that a release is made of, found and read."""

    merged: Path
    record: MergeRecord
    exports: Mapping[str, tuple[Path, ExportRecord]]
    """By folder in the release."""
    passage: Passage
    licence: Licence

    @property
    def findings(self) -> tuple[RecordedFinding, ...]:
        """What was noticed by any stage, once."""
        licence = [
            RecordedFinding(code=f.code, severity=f.severity.value, target=f.target, message=f.message)
            for f in self.licence.findings
        ]
        found = (*self.record.findings, *(f for _, export in self.exports.values() for f in export.findings), *licence)
        return tuple(dict.fromkeys(found))


def assemble(
    merged: Path, out: Path, options: ReleaseOptions, *, graphs: Sequence[Path] = (), progress: Progress | None = None
) -> Release:
    """Make a release of a merged folder and its graphs at ``out``.

    Raises:
        ReleaseError: A check failed, or the licence is unclear.
        InconclusiveError: A check is missing, and nobody accepted that.
        DigestMismatchError: A file is not the recorded one.
        OutputExistsError: Something else is at ``out``.
    """
    root, out = out, out.resolve()
    parts = _gathered(merged, graphs, options)
    with locked(out) as partial:
        for path in partial.iterdir():
            if path.name != WORK_FOLDER:
                remove(path)
        manifest = _write(parts, partial, out.name, options, progress)
        if _holds(out, manifest):
            remove(partial)
            return Release(root=root, manifest=manifest, was_done=True)
        _require_free(out, fresh=options.fresh)
        publish(partial, out)
    for file in manifest.files:
        remember_sha256(out / file.path, file.sha256)
    tidy(out)
    return Release(root=root, manifest=manifest)


def default_graphs(merged: Path) -> tuple[Path, ...]:
    """Find the exports inside a merged folder."""
    return tuple(sorted(path.parent for path in merged.glob(f"*/{EXPORT_RECORD}")))


def _gathered(merged: Path, graphs: Sequence[Path], options: ReleaseOptions) -> _Parts:
    record = read_record(merged)
    exports = {}
    for folder in graphs:
        name = folder.resolve().name
        if name in exports:
            raise RecipeError(f"--onnx {folder}: two folders are called {name}")
        exports[name] = (folder, read_export(folder))
    digests = {file.path: file.sha256 for file in record.artifacts}
    digests |= {
        f"{name}/{file.path}": file.sha256 for name, (_, export) in exports.items() for file in export.artifacts
    }
    passage = pass_gate(read_evidence(merged), digests, options.accepted, has_graphs=bool(exports))
    adapters = [Path(adapter.path).parent for adapter in record.adapters]
    licence = licence_of(Path(record.base.root), adapters, options.license)
    return _Parts(merged=merged, record=record, exports=exports, passage=passage, licence=licence)


def _write(parts: _Parts, folder: Path, name: str, options: ReleaseOptions, progress: Progress | None) -> Manifest:
    content = _place_content(parts, folder, progress)
    evidence = [_placed(parts.merged, RECORD_NAME, folder, RECORD_NAME)]
    if (parts.merged / EVIDENCE_NAME).is_file():
        evidence.append(_placed(parts.merged, EVIDENCE_NAME, folder, EVIDENCE_NAME))
    facts = _card_facts(parts, name, options)
    evidence.append(_written(folder, CARD_NAME, card_text(facts)))
    bom = bill_of_materials(name, content, content.digest, parts.licence.card.get("license"))
    evidence.append(_written(folder, PROVENANCE_NAME, canonical_json(provenance(content))))
    evidence.append(_written(folder, BOM_NAME, canonical_json(bom)))
    sizes = [(file.path, file.n_bytes) for file in content.files]
    evidence.append(_written(folder, REPORT_NAME, report_html(facts, sizes)))
    manifest = Manifest(
        schema=SCHEMA,
        name=name,
        content=content,
        evidence=EvidencePart(files=tuple(sorted(evidence, key=_path)), verdicts=dict(parts.passage.verdicts)),
        accepted=parts.passage.accepted,
        findings=parts.findings,
    )
    own = _written(folder, MANIFEST_NAME, manifest.text())
    if options.sign_key is not None:
        sign(folder, {file.path: file.sha256 for file in (*manifest.files, own)}, options.sign_key)
    return manifest


def _place_content(parts: _Parts, folder: Path, progress: Progress | None) -> Content:
    record = parts.record
    wanted = [(parts.merged, file, file.path) for file in record.artifacts]
    for name, (place, export) in parts.exports.items():
        wanted += [(place, file, f"{name}/{file.path}") for file in export.artifacts]
    files = []
    with reporting(progress, "assembling", sum(file.n_bytes for _, file, _ in wanted)) as advance:
        for place, file, target in wanted:
            found = _placed(place, file.path, folder, target)
            if found.sha256 != file.sha256:
                raise DigestMismatchError(
                    f"{place / file.path}: found sha256 {found.sha256}, its record says {file.sha256}",
                    hint="it was changed since: merge or export again, and verify",
                )
            files.append(found)
            advance(file.n_bytes)
    for name, (place, _) in parts.exports.items():
        files.append(_placed(place, EXPORT_RECORD, folder, f"{name}/{EXPORT_RECORD}"))
    taken = {file.path for file in files}
    for name, path in parts.licence.files.items():
        if name not in taken:
            files.append(_placed(path.parent, path.name, folder, name))
    options = dict(record.options) | {"exports": {n: export.options for n, (_, export) in parts.exports.items()}}
    versions = dict(record.versions)
    for _, export in parts.exports.values():
        versions |= export.versions
    return Content(
        files=tuple(sorted(files, key=_path)),
        base=ReleasedBase(name=public_name(record), revision=record.base.revision, files=record.base.files),
        adapters=tuple(ReleasedAdapter.of(adapter) for adapter in record.adapters),
        recipe=None,
        options=options,
        versions=versions,
    )


def _card_facts(parts: _Parts, name: str, options: ReleaseOptions) -> CardFacts:
    config = parts.merged / "config.json"
    return CardFacts(
        name=name,
        record=parts.record,
        config=read_json(config) if config.is_file() else {},
        exports={folder: export for folder, (_, export) in parts.exports.items()},
        licence=parts.licence.card,
        adapter_card=card_metadata(Path(parts.record.adapters[0].path).parent),
        verdicts=parts.passage.verdicts,
        evidence=read_evidence(parts.merged) or {},
        accepted=parts.passage.accepted,
        findings=parts.findings,
        template=options.card_template,
    )


def _require_free(out: Path, *, fresh: bool) -> None:
    if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / MANIFEST_NAME).is_file():
        raise OutputExistsError(f"{out}: exists and is no release of ours", hint="choose another -o")
    if not fresh:
        raise OutputExistsError(f"{out}: holds another release", hint="choose another -o, or replace it with --fresh")


def _holds(out: Path, manifest: Manifest) -> bool:
    """Whether a folder is this very release, by its manifest and the files' digests."""
    try:
        found = read_manifest(out)
        check_listing(out, found)
    except LoraDeployError:
        return False
    return found == manifest and all(cached_sha256(out / file.path) == file.sha256 for file in found.files)


def _placed(source: Path, name: str, folder: Path, target: str) -> RecordedFile:
    """Bring a file into the release and say what it is."""
    origin, path = source / name, folder / target
    if origin.is_symlink() and not origin.exists():
        raise ReleaseError(f"{origin}: is a link to nothing")
    if not origin.is_file():
        raise ReleaseError(f"{origin}: is missing", hint="merge or export again", code="missing-file")
    path.parent.mkdir(parents=True, exist_ok=True)
    sha256 = cached_sha256(origin)
    _share(origin.resolve(), path)
    return RecordedFile(path=target, n_bytes=path.stat().st_size, sha256=sha256)


def _share(origin: Path, path: Path) -> None:
    """Let ``path`` hold what ``origin`` holds, at no cost where the file system can."""
    with origin.open("rb") as source, path.open("wb") as target, suppress(OSError):
        fcntl.ioctl(target.fileno(), _FICLONE, source.fileno())
        return
    path.unlink()
    try:
        os.link(origin, path)
    except OSError:
        shutil.copyfile(origin, path)


def _written(folder: Path, name: str, text: str) -> RecordedFile:
    artifact = write_file(folder / name, text.encode(), (), root=folder)
    return RecordedFile(path=str(artifact.path), n_bytes=artifact.n_bytes, sha256=artifact.sha256)


def _path(file: RecordedFile) -> str:
    return file.path
