"""The release manifest, ``lora_deploy.json``: every file of a release, where it came from, what was proven.

Promise: it names every file of the folder but itself and the signature. ``content`` (weights, graphs, configuration,
tokenizer and licence files, inputs, options, versions) is the same for the same inputs, byte for byte; ``evidence``
names the rest. ``check`` believes nothing: it reads the files.
Source: docs/release_format.md.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lora_deploy.artifact import Artifact, cached_sha256, sha256_of
from lora_deploy.checkpoint import read_json
from lora_deploy.errors import (
    DigestMismatchError,
    InputError,
    LoraDeployError,
    MalformedCheckpointError,
    ReleaseError,
    UnsafeFileError,
)
from lora_deploy.hubs.interface import LEFT_BY_CLIENTS
from lora_deploy.merge.output import WORK_FOLDER
from lora_deploy.merge.progress import Progress, reporting
from lora_deploy.merge.record import RecordedAdapter, RecordedFile, RecordedFinding
from lora_deploy.release.options import Acceptance

MANIFEST_NAME = "lora_deploy.json"
SIGNATURE_NAME = "model.sig"
SCHEMA: Literal[1] = 1
_IGNORED = (*LEFT_BY_CLIENTS, PurePosixPath(WORK_FOLDER))
"""What hubs and their clients leave in a folder that they wrote; and we, when killed just after it was complete."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ReleasedBase(_Frozen):
    """The base that was merged into, by name and digest, not by place."""

    name: str
    revision: str | None
    files: tuple[RecordedFile, ...]


class ReleasedAdapter(_Frozen):
    """One adapter, in the order of application."""

    name: str
    format: str
    sha256: str
    config_sha256: str | None
    weight: float
    base_name: str | None
    base_revision: str | None

    @classmethod
    def of(cls, recorded: RecordedAdapter) -> ReleasedAdapter:
        """Leave out where it lay."""
        return cls(**recorded.model_dump(exclude={"path"}))


class Content(_Frozen):
    """What is promised byte for byte."""

    files: tuple[RecordedFile, ...]
    base: ReleasedBase
    adapters: tuple[ReleasedAdapter, ...]
    recipe: dict[str, Any] | None
    options: dict[str, Any]
    """``read``, ``bind`` and ``merge`` options, and those of every export by its folder."""
    versions: dict[str, str]
    """Of what made weights and graphs."""

    @property
    def digest(self) -> str:
        """The sha256 of this in canonical JSON: what two releases of the same inputs share."""
        return hashlib.sha256(canonical_json(self.model_dump(mode="json")).encode()).hexdigest()


class EvidencePart(_Frozen):
    """What was measured and written about it."""

    files: tuple[RecordedFile, ...]
    verdicts: dict[str, str]
    """By check."""


class Manifest(_Frozen):
    """The whole manifest."""

    schema_version: Literal[1] = Field(SCHEMA, alias="schema")
    name: str
    content: Content
    evidence: EvidencePart
    accepted: tuple[Acceptance, ...]
    findings: tuple[RecordedFinding, ...]

    @property
    def files(self) -> tuple[RecordedFile, ...]:
        """Every file but the manifest and the signature."""
        return tuple(sorted((*self.content.files, *self.evidence.files), key=lambda file: file.path))

    def text(self) -> str:
        """The file's content."""
        return canonical_json(self.model_dump(mode="json", by_alias=True))


def canonical_json(value: Mapping[str, Any]) -> str:
    """Sorted keys, two spaces, UTF-8 as it is, no NaN, one final newline."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def read_manifest(root: Path) -> Manifest:
    """Read a release's manifest; no other file is looked at.

    Raises:
        InputError: There is none, or it is not one that this version reads.
    """
    path = root / MANIFEST_NAME
    if path.is_symlink():
        raise UnsafeFileError(f"{path}: is a link, expected a file")
    if not path.is_file():
        raise InputError(f"{root}: has no {MANIFEST_NAME}", hint="make a release with lora-deploy release")
    try:
        document = read_json(path)
    except MalformedCheckpointError as error:
        raise InputError(error.message) from error
    if document.get("schema") != SCHEMA:
        raise InputError(
            f"{path}: found schema {document.get('schema')!r}, expected {SCHEMA}", hint="a newer lora-deploy wrote it?"
        )
    try:
        return Manifest.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{path}: {where}: {first['msg']}") from error


def check(root: Path, progress: Progress | None = None) -> Manifest:
    """Read every file of a release and compare it with the manifest.

    Raises:
        DigestMismatchError: A file is not the one that was released.
        ReleaseError: A file is missing, or is one that the manifest does not name.
        UnsafeFileError: Something in the folder is a link.
        InputError: There is no manifest.
    """
    manifest = read_manifest(root)
    check_listing(root, manifest)
    with reporting(progress, "checking digests", sum(file.n_bytes for file in manifest.files)) as advance:
        for file in manifest.files:
            found = sha256_of(root / file.path)
            if found != file.sha256:
                raise DigestMismatchError(
                    f"{root / file.path}: found sha256 {found}, expected {file.sha256}",
                    hint="the file was changed after the release was made: make it again",
                )
            advance(file.n_bytes)
    return manifest


def check_listing(root: Path, manifest: Manifest) -> None:
    """Compare names and sizes with the manifest; contents are not read.

    Raises:
        DigestMismatchError: A size differs.
        ReleaseError: A file is missing, or is one that the manifest does not name.
        UnsafeFileError: Something in the folder is a link.
    """
    present = dict(walk(root))
    expected = {file.path: file.n_bytes for file in manifest.files}
    for path in sorted(set(present) - set(expected) - {MANIFEST_NAME, SIGNATURE_NAME}):
        raise ReleaseError(
            f"{root / path}: is in the folder and not in {MANIFEST_NAME}", hint="remove it", code="extra-file"
        )
    for path, n_bytes in sorted(expected.items()):
        if path not in present:
            raise ReleaseError(f"{root / path}: is missing", hint="make the release again", code="missing-file")
        if present[path] != n_bytes:
            raise DigestMismatchError(f"{root / path}: found {present[path]} bytes, expected {n_bytes}")


def intact(root: Path) -> Manifest | None:
    """Give the manifest of a folder that holds exactly what it names, else None.

    Files that did not change since they were last digested are not read again.
    """
    try:
        manifest = read_manifest(root)
        check_listing(root, manifest)
    except LoraDeployError:
        return None
    is_whole = all(cached_sha256(root / file.path) == file.sha256 for file in manifest.files)
    return manifest if is_whole else None


def walk(root: Path) -> Iterator[tuple[str, int]]:
    """Give every file of a folder, by path and size, but what hub clients leave behind.

    Raises:
        UnsafeFileError: There is a link, or something that is no file.
    """
    for entry in sorted(os.scandir(root), key=lambda found: found.name):
        yield from _walk(Path(entry.path), PurePosixPath(entry.name))


def _walk(path: Path, name: PurePosixPath) -> Iterator[tuple[str, int]]:
    if name in _IGNORED:
        return
    if path.is_symlink():
        raise UnsafeFileError(f"{path}: is a link, expected a file", hint="a release holds its files themselves")
    if path.is_dir():
        for inner in sorted(path.iterdir()):
            yield from _walk(inner, name / inner.name)
    elif path.is_file():
        yield str(name), path.stat().st_size
    else:
        raise UnsafeFileError(f"{path}: is neither a file nor a folder")


def artifacts_of(root: Path, manifest: Manifest) -> tuple[Artifact, ...]:
    """List everything that is pushed: content, evidence, the signature, and at last the manifest."""
    files = [Artifact(PurePosixPath(file.path), file.n_bytes, file.sha256) for file in manifest.files]
    for name in (SIGNATURE_NAME, MANIFEST_NAME):
        path = root / name
        if path.is_file():
            files.append(Artifact(PurePosixPath(name), path.stat().st_size, cached_sha256(path)))
    return tuple(files)
