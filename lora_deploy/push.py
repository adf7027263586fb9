"""Publish a release: exactly what its manifest names, all or nothing, and read back. And fetch one the same way.

Promise: nothing is sent whose bytes are not the manifest's; a receipt is given only after the target itself has named
the digest of every file, and they are the release's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lora_deploy.artifact import Artifact, remember_sha256, sha256_of
from lora_deploy.errors import DigestMismatchError, MergeError, OutputExistsError, PushError, ReleaseError
from lora_deploy.hubs.interface import Hub, Preview, Tags, is_left_by_client
from lora_deploy.hubs.open import open_hub
from lora_deploy.hubs.options import PushOptions
from lora_deploy.hubs.repository import digest_like
from lora_deploy.merge.output import abandon, locked, publish, remove, tidy
from lora_deploy.merge.progress import Progress, reporting
from lora_deploy.release.manifest import (
    MANIFEST_NAME,
    SIGNATURE_NAME,
    Manifest,
    artifacts_of,
    check_listing,
    read_manifest,
    walk,
)
from lora_deploy.safetensors_file import write_file

_MAX_MANIFEST_BYTES = 100_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What a target holds now, by its own word."""

    target: str
    revision: str | None
    url: str
    n_bytes: int
    n_sent_bytes: int
    digests: dict[str, str]
    """Read back from the target, by path."""
    notes: tuple[str, ...] = ()
    pull_request: str | None = None
    """Its address, where one was opened."""
    tag: str | None = None
    """The tag that was set."""


def preview(root: Path, target: str, options: PushOptions) -> Preview:
    """Say what a push would send; nothing is changed anywhere.

    Raises:
        ReleaseError: The folder is not what its manifest says.
        PushError: The target does not answer, or would refuse.
    """
    manifest = read_manifest(root)
    check_listing(root, manifest)
    with open_hub(target, options) as hub:
        return hub.preview(root, artifacts_of(root, manifest))


def push(root: Path, target: str, options: PushOptions, progress: Progress | None = None) -> Receipt:
    """Publish the release in ``root``.

    Raises:
        ReleaseError: The folder is not what its manifest says.
        PushError: The target did not take it, and is as it was.
    """
    manifest = read_manifest(root)
    check_listing(root, manifest)
    files = artifacts_of(root, manifest)
    with open_hub(target, options) as hub:
        published = hub.publish(root, files, f"Release {manifest.name} with lora-deploy", progress)
        digests = dict(hub.read_back(root, files, published))
        for file in files:
            _require_same(root, file, digests[str(file.path)], published.url)
        if isinstance(hub, Tags):
            hub.set_tag(published)
    return Receipt(
        target=target,
        revision=published.revision,
        url=published.url,
        n_bytes=sum(file.n_bytes for file in files),
        n_sent_bytes=published.n_sent_bytes,
        digests=digests,
        notes=published.notes,
        pull_request=published.pull_request,
        tag=options.tag,
    )


def _require_same(root: Path, file: Artifact, digest: str, url: str) -> None:
    expected = digest_like(root, file, digest)
    if digest != expected:
        raise PushError(
            f"{url}: {file.path}: the target says {digest}, expected {expected}",
            hint="what is there is not the release: do not use it, and push again",
            code="digest-mismatch",
        )


def pull(target: str, out: Path, options: PushOptions, progress: Progress | None = None) -> Manifest:
    """Fetch a release into ``out``, checking every digest; the folder appears whole or not at all.

    Raises:
        ReleaseError: What is there is not what its manifest says.
        PushError: The target does not give it.
        OutputExistsError: Something is at ``out``.
    """
    out = out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputExistsError(f"{out}: is in the way", hint="choose another folder")
    with open_hub(target, options) as hub:
        try:
            with locked(out) as partial:
                try:
                    manifest = _fetch(hub, partial, progress)
                    publish(partial, out)
                finally:
                    if partial.exists():
                        abandon(partial)
        except MergeError as error:
            error.hint = error.hint and error.hint.replace("-o", "folder")  # as those who merge call it
            raise
    for file in manifest.files:
        remember_sha256(out / file.path, file.sha256)
    tidy(out)
    return manifest


def _fetch(hub: Hub, folder: Path, progress: Progress | None) -> Manifest:
    listing = hub.listing()
    if MANIFEST_NAME not in listing:
        raise ReleaseError(f"{hub.url}: holds no {MANIFEST_NAME}: it is no release", code="no-release")
    if listing[MANIFEST_NAME] > _MAX_MANIFEST_BYTES:
        raise ReleaseError(f"{hub.url}: its manifest has {listing[MANIFEST_NAME]} bytes", code="no-release")
    _save(hub, MANIFEST_NAME, folder)
    manifest = read_manifest(folder)
    wanted = {file.path for file in manifest.files} | {MANIFEST_NAME, SIGNATURE_NAME}
    _require_exactly(hub, listing, manifest, wanted)
    if SIGNATURE_NAME in listing:
        _save(hub, SIGNATURE_NAME, folder)
    for name, _ in list(walk(folder)):
        if name not in wanted:
            remove(folder / name)
    with reporting(progress, "fetching", sum(file.n_bytes for file in manifest.files)) as advance:
        for file in manifest.files:
            path = folder / file.path
            if not (path.is_file() and sha256_of(path) == file.sha256):  # else it is of a pull that broke off
                found = _save(hub, file.path, folder)
                if found.sha256 != file.sha256:
                    path.unlink()
                    what = f"{hub.url}/{file.path}"
                    raise DigestMismatchError(f"{what}: found sha256 {found.sha256}, expected {file.sha256}")
            advance(file.n_bytes)
    return manifest


def _require_exactly(hub: Hub, listing: Mapping[str, int], manifest: Manifest, wanted: Collection[str]) -> None:
    """Compare the names at the target with the manifest."""
    missing = [file.path for file in manifest.files if file.path not in listing]
    if missing:
        raise ReleaseError(f"{hub.url}: lacks {missing[0]}, which its manifest names", code="missing-file")
    extra = sorted(path for path in listing if path not in wanted and not is_left_by_client(path))
    if extra:
        raise ReleaseError(
            f"{hub.url}: holds {extra[0]}{' and others' if len(extra) > 1 else ''}, which its manifest does not name",
            hint="it was changed after it was pushed: push the release again",
            code="extra-file",
        )


def _save(hub: Hub, name: str, folder: Path) -> Artifact:
    path = folder / PurePosixPath(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with hub.opened(name) as pieces:
        return write_file(path, b"", (memoryview(piece) for piece in pieces), root=folder)
