"""Put a release together: weights, graphs, evidence, card, manifest; in one folder that appears whole or not at all.

Promise: nothing enters that its own record does not name with this digest; nothing that failed its check enters. Large
files are shared with their origin where the file system can (reflink, else a hard link), never linked by name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_deploy.artifact import remember_sha256
from lora_deploy.checkpoint import read_json
from lora_deploy.errors import DigestMismatchError, OutputExistsError
from lora_deploy.evidence.dossier import EVIDENCE_NAME
from lora_deploy.export.record import RECORD_NAME as EXPORT_RECORD
from lora_deploy.merge.output import WORK_FOLDER, locked, publish, remove, tidy
from lora_deploy.merge.progress import Progress, reporting
from lora_deploy.merge.record import RECORD_NAME, MergeRecord, RecordedFile, RecordedOrigin
from lora_deploy.pipeline_layout import MODEL_INDEX
from lora_deploy.release.card import CARD_NAME, CardFacts, card_text, public_name
from lora_deploy.release.gate import read_evidence
from lora_deploy.release.licence import card_metadata
from lora_deploy.release.manifest import (
    MANIFEST_NAME,
    SCHEMA,
    Content,
    EvidencePart,
    Manifest,
    ReleasedAdapter,
    ReleasedBase,
    canonical_json,
    intact,
)
from lora_deploy.release.options import ReleaseOptions
from lora_deploy.release.parts import Parts, gather, inside
from lora_deploy.release.placing import placed, written
from lora_deploy.release.provenance import BOM_NAME, PROVENANCE_NAME, bill_of_materials, provenance
from lora_deploy.release.published import Places, published_export, published_origin, published_record
from lora_deploy.release.report import REPORT_NAME, report_html
from lora_deploy.release.sign import require_key, sign


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Release:
    """A finished release."""

    root: Path
    manifest: Manifest
    was_done: bool = False


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
    _require_ours(out)
    require_key(options)
    parts = gather(merged, graphs, options)
    with locked(out) as partial:
        for path in partial.iterdir():
            if path.name != WORK_FOLDER:
                remove(path)
        manifest = _write(parts, partial, out.name, options, progress)
        if intact(out) == manifest:
            remove(partial)
            return Release(root=root, manifest=manifest, was_done=True)
        _require_free(out, fresh=options.fresh)
        publish(partial, out)
    for file in manifest.files:
        remember_sha256(out / file.path, file.sha256)
    tidy(out)
    return Release(root=root, manifest=manifest)


def _write(parts: Parts, folder: Path, name: str, options: ReleaseOptions, progress: Progress | None) -> Manifest:
    places = Places(parts.record, parts.root)
    content = _place_content(parts, folder, places, options.recipe, progress)
    record: MergeRecord | RecordedOrigin
    evidence = []
    if isinstance(parts.record, MergeRecord):
        record = published_record(parts.record, places)
        evidence.append(written(folder, RECORD_NAME, record.text()))
    else:
        record = published_origin(parts.record, places)
    measured = places.published(read_evidence(parts.root))
    if measured is not None:
        evidence.append(written(folder, EVIDENCE_NAME, canonical_json(measured)))
    facts = _card_facts(parts, record, measured or {}, places, name, options)
    evidence.append(written(folder, CARD_NAME, card_text(facts)))
    bom = bill_of_materials(name, content, content.digest, parts.licence.card.get("license"))
    evidence.append(written(folder, PROVENANCE_NAME, canonical_json(provenance(content))))
    evidence.append(written(folder, BOM_NAME, canonical_json(bom)))
    sizes = [(file.path, file.n_bytes) for file in content.files]
    evidence.append(written(folder, REPORT_NAME, report_html(facts, sizes)))
    manifest = Manifest(
        schema=SCHEMA,
        name=name,
        content=content,
        evidence=EvidencePart(files=tuple(sorted(evidence, key=_path)), verdicts=dict(parts.passage.verdicts)),
        accepted=parts.passage.accepted,
        findings=tuple(facts.findings),
    )
    own = written(folder, MANIFEST_NAME, manifest.text())
    if options.sign_key is not None:
        digests = {file.path: file.sha256 for file in (*manifest.files, own)}
        sign(folder, digests, options.sign_key, options.sign_certificate)
    return manifest


def _place_content(
    parts: Parts, folder: Path, places: Places, recipe: Mapping[str, Any] | None, progress: Progress | None
) -> Content:
    record = parts.record
    merged = record.artifacts if isinstance(record, MergeRecord) else ()
    wanted = [(parts.root, file, file.path) for file in merged]
    for name, (place, export) in parts.exports.items():
        wanted += [(place, file, inside(name, file.path)) for file in export.artifacts]
    files = []
    with reporting(progress, "assembling", sum(file.n_bytes for _, file, _ in wanted)) as advance:
        for place, file, target in wanted:
            found = placed(place, file.path, folder, target)
            if found.sha256 != file.sha256:
                raise DigestMismatchError(
                    f"{place / file.path}: found sha256 {found.sha256}, its record says {file.sha256}",
                    hint="it was changed since: merge or export again, and verify",
                )
            files.append(found)
            advance(file.n_bytes)
    for name, (place, _) in parts.exports.items():
        text = canonical_json(published_export(read_json(place / EXPORT_RECORD), places))
        files.append(written(folder, inside(name, EXPORT_RECORD), text))
    taken = {file.path for file in files}
    for name, path in parts.licence.files.items():
        if name not in taken:
            files.append(placed(path.parent, path.name, folder, name))
    options = dict(record.options) | {"exports": {n: export.options for n, (_, export) in parts.exports.items()}}
    versions = dict(record.versions)
    for _, export in parts.exports.values():
        versions |= export.versions
    return Content(
        files=tuple(sorted(files, key=_path)),
        base=ReleasedBase(name=public_name(record), revision=record.base.revision, files=record.base.files),
        adapters=tuple(ReleasedAdapter.of(adapter) for adapter in record.adapters),
        recipe=places.published(recipe),
        options=options,
        versions=versions,
    )


def _card_facts(
    parts: Parts,
    record: MergeRecord | RecordedOrigin,
    measured: Mapping[str, Any],
    places: Places,
    name: str,
    options: ReleaseOptions,
) -> CardFacts:
    found = [parts.root / config for config in (MODEL_INDEX, "config.json")]
    return CardFacts(
        name=name,
        record=record,
        config=next((read_json(path) for path in found if path.is_file()), {}),
        exports={folder: export for folder, (_, export) in parts.exports.items()},
        licence=parts.licence.card,
        adapter_card=card_metadata(Path(parts.record.adapters[0].path).parent),
        verdicts=parts.passage.verdicts,
        evidence=measured,
        accepted=parts.passage.accepted,
        findings=places.findings(parts.findings),
        template=options.card_template,
    )


def _require_ours(out: Path) -> bool:
    """Let what is no release of ours alone; whether there is one."""
    if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / MANIFEST_NAME).is_file():
        raise OutputExistsError(f"{out}: exists and is no release of ours", hint="choose another -o")
    return True


def _require_free(out: Path, *, fresh: bool) -> None:
    if _require_ours(out) and not fresh:
        raise OutputExistsError(f"{out}: holds another release", hint="choose another -o, or replace it with --fresh")


def _path(file: RecordedFile) -> str:
    return file.path
