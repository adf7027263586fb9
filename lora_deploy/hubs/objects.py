"""Object stores, through fsspec: ``s3://``, ``gs://``, ``az://``.

Promise: there is no rename in a store, so content goes first and the manifest last: a prefix whose manifest is there
holds the whole release. Another one is replaced only with ``--yes``, and its manifest goes first: until the new one is
there, the prefix holds no release. The manifest is created only where there is none, in one step where the store can
promise that. What is there is known by reading it, never by its name.
Source: fsspec 2026.9; s3fs writes with ``If-None-Match`` where a file is to be created.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_deploy.artifact import Artifact
from lora_deploy.errors import RecipeError, RevisionConflictError
from lora_deploy.hubs.answers import asking
from lora_deploy.hubs.interface import Preview, Published, mismatch, require_unchanged
from lora_deploy.hubs.options import PushOptions
from lora_deploy.merge.progress import Progress, reporting

PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs"}
_CONNECT_SECONDS, _READ_SECONDS = 10, 120
_SIGN_IN = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "gs": "log in with gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or AZURE_STORAGE_CONNECTION_STRING",
}
_CHUNK_BYTES = 1 << 22


class ObjectStore:
    """A prefix in a bucket."""

    def __init__(self, url: str, options: PushOptions) -> None:
        """Ask nothing yet.

        Raises:
            RecipeError: The store's package is not installed, or the address names no bucket.
        """
        from fsspec.core import url_to_fs

        self._scheme, _, rest = url.partition("://")
        if not rest.strip("/"):
            raise RecipeError(f"{url}: names no bucket", hint=f"{self._scheme}://bucket/prefix")
        try:
            self._files, self._prefix = url_to_fs(url, **_limits(self._scheme))
        except ImportError as error:
            package = PACKAGES[self._scheme]
            raise RecipeError(
                f"{self._scheme}:// needs the package {package}",
                hint=f"pip install 'lora-deploy[{self._scheme}]'",
                code="missing-package",
            ) from error
        self._prefix = self._prefix.rstrip("/")
        self._options = options
        self.url = url.rstrip("/")

    def preview(self, root: Path, files: Sequence[Artifact]) -> Preview:
        """Read what is there."""
        there = self._require_free(files)
        missing = tuple(file for file in files if not self._holds(file, there))
        doomed = sorted(set(there) - {str(file.path) for file in files})
        notes = [f"{path} would be removed" for path in doomed]
        return Preview(url=self.url, to_send=missing, notes=tuple(notes))

    def publish(self, root: Path, files: Sequence[Artifact], title: str, progress: Progress | None) -> Published:
        """Unless it is there: take an older manifest away, send what is missing, then the manifest."""
        *content, manifest = files
        there = self._require_free(files)
        missing = [file for file in content if not self._holds(file, there)]
        require_unchanged(root, [file for file in content if file not in missing])
        doomed = set(there) - {str(file.path) for file in files}
        is_sealed = self._holds(manifest, there)
        if is_sealed and not missing and not doomed:
            notes = ("it held this release already",)
            return Published(revision=None, url=self.url, n_sent_bytes=0, notes=notes)
        if str(manifest.path) in there:
            self._remove({str(manifest.path)})
        with reporting(progress, "pushing", sum(file.n_bytes for file in missing)) as advance:
            for file in missing:
                self._send(root, file)
                advance(file.n_bytes)
        self._remove(doomed)
        self._seal(root, manifest)
        n_sent = sum(file.n_bytes for file in (*missing, manifest))
        return Published(revision=None, url=self.url, n_sent_bytes=n_sent)

    def read_back(self, root: Path, files: Sequence[Artifact], published: Published) -> Mapping[str, str]:
        """Read everything and hash it."""
        return {str(file.path): f"sha256:{self._sha256(str(file.path))}" for file in files}

    def listing(self) -> Mapping[str, int]:
        """List what is below the prefix; a console's markers of folders are no files."""
        with self._asking():
            self._files.invalidate_cache()
            found = self._files.find(self._prefix, detail=True)
        return {
            path[len(self._prefix) + 1 :]: int(entry["size"])
            for path, entry in found.items()
            if entry.get("type") == "file" and not path.endswith("/")
        }

    @contextmanager
    def opened(self, path: str) -> Iterator[Iterator[bytes]]:
        """Read an object in pieces of 4 MiB."""
        with self._asking(f"/{path}"), self._files.open(f"{self._prefix}/{path}", "rb") as stream:
            yield iter(lambda: stream.read(_CHUNK_BYTES), b"")

    def _asking(self, what: str = "") -> Any:  # noqa: ANN401 - a context manager
        return asking(f"{self.url}{what}", sign_in=_SIGN_IN[self._scheme])

    def _require_free(self, files: Sequence[Artifact]) -> Mapping[str, int]:
        """Give what is there; what is neither this release nor a part of it needs ``--yes``."""
        there = self.listing()
        manifest = files[-1]
        others = sorted(set(there) - {str(file.path) for file in files})
        is_another = str(manifest.path) in there and not self._holds(manifest, there)
        if (others or is_another) and not self._options.yes:
            raise RevisionConflictError(
                f"{self.url}: holds {'another release' if is_another else others[0]}",
                hint="choose another prefix, or replace all of it with --yes",
                code="holds-other",
            )
        return there

    def _holds(self, file: Artifact, there: Mapping[str, int]) -> bool:
        path = str(file.path)
        return there.get(path) == file.n_bytes and self._sha256(path) == file.sha256

    def _sha256(self, path: str) -> str:
        digest = hashlib.sha256()
        with self.opened(path) as pieces:
            for piece in pieces:
                digest.update(piece)
        return digest.hexdigest()

    def _send(self, root: Path, file: Artifact) -> None:
        digest = hashlib.sha256()
        target = f"{self._prefix}/{file.path}"
        with (
            (root / file.path).open("rb", buffering=0) as source,
            self._asking(f"/{file.path}"),
            self._files.open(target, "wb") as sink,
        ):
            while piece := source.read(_CHUNK_BYTES):
                digest.update(piece)
                sink.write(piece)
        if digest.hexdigest() != file.sha256:
            with self._asking(f"/{file.path}"):
                self._files.rm_file(target)
            raise mismatch(root, file, digest.hexdigest())

    def _seal(self, root: Path, manifest: Artifact) -> None:
        content = (root / manifest.path).read_bytes()
        if hashlib.sha256(content).hexdigest() != manifest.sha256:
            raise mismatch(root, manifest, hashlib.sha256(content).hexdigest())
        with self._asking(f"/{manifest.path}"):
            try:
                self._files.pipe_file(f"{self._prefix}/{manifest.path}", content, mode="create")
            except FileExistsError as error:
                raise RevisionConflictError(
                    f"{self.url}: somebody else released there meanwhile", hint="choose another prefix", code="moved"
                ) from error

    def _remove(self, paths: set[str]) -> None:
        for path in sorted(paths):
            with self._asking(f"/{path}"):
                self._files.rm_file(f"{self._prefix}/{path}")


def _limits(scheme: str) -> dict[str, Any]:
    """Say how long a call may take, in the words of the store's package; each has a default of its own."""
    if scheme == "s3":
        return {"config_kwargs": {"connect_timeout": _CONNECT_SECONDS, "read_timeout": _READ_SECONDS}}
    if scheme == "gs":
        return {"requests_timeout": _READ_SECONDS}
    return {"connection_timeout": _CONNECT_SECONDS, "read_timeout": _READ_SECONDS}
