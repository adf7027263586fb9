"""Object stores, through fsspec: ``s3://``, ``gs://``, ``az://``.

Promise: there is no rename in a store, so content goes first and the manifest last: a prefix whose manifest is there
holds the whole release. A prefix without one is written only if no other writer makes it meanwhile, where the store can
promise that; another release is replaced only with ``--yes``. What is there is known by reading it, never by its name.
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
_CHUNK_BYTES = 1 << 22


class ObjectStore:
    """A prefix in a bucket."""

    def __init__(self, url: str, options: PushOptions) -> None:
        """Ask nothing yet.

        Raises:
            RecipeError: The store's package is not installed, or the address names no bucket.
        """
        from fsspec.core import url_to_fs

        scheme, _, rest = url.partition("://")
        if not rest.strip("/"):
            raise RecipeError(f"{url}: names no bucket", hint=f"{scheme}://bucket/prefix")
        try:
            self._files, self._prefix = url_to_fs(url)
        except ImportError as error:
            hint = f"pip install {PACKAGES[scheme]}"
            raise RecipeError(f"{scheme}:// needs {PACKAGES[scheme]}", hint=hint, code="missing-package") from error
        self._prefix = self._prefix.rstrip("/")
        self._options = options
        self.url = url.rstrip("/")

    def preview(self, root: Path, files: Sequence[Artifact]) -> Preview:
        """Read what is there."""
        self._require_free(files)
        return Preview(url=self.url, to_send=tuple(file for file in files if not self._holds(file)))

    def publish(self, root: Path, files: Sequence[Artifact], title: str, progress: Progress | None) -> Published:
        """Send what is missing, the manifest last; then remove what only the release before had."""
        *content, manifest = files
        before = self._require_free(files)
        missing = [file for file in content if not self._holds(file)]
        require_unchanged(root, [file for file in content if file not in missing])
        with reporting(progress, "pushing", sum(file.n_bytes for file in missing)) as advance:
            for file in missing:
                self._send(root, file)
                advance(file.n_bytes)
        if before is None or not self._holds(manifest):
            self._seal(root, manifest, is_new=before is None)
            missing.append(manifest)
        self._remove(set(self.listing()) - {str(file.path) for file in files})
        return Published(revision=None, url=self.url, n_sent_bytes=sum(file.n_bytes for file in missing))

    def read_back(self, root: Path, files: Sequence[Artifact], published: Published) -> Mapping[str, str]:
        """Read everything and hash it."""
        return {str(file.path): f"sha256:{self._sha256(str(file.path))}" for file in files}

    def listing(self) -> Mapping[str, int]:
        """List what is below the prefix."""
        with self._asking():
            self._files.invalidate_cache()
            found = self._files.find(self._prefix, detail=True)
        return {path[len(self._prefix) + 1 :]: int(entry["size"]) for path, entry in found.items()}

    @contextmanager
    def opened(self, path: str) -> Iterator[Iterator[bytes]]:
        """Read an object in pieces of 4 MiB."""
        with self._asking(f"/{path}"), self._files.open(f"{self._prefix}/{path}", "rb") as stream:
            yield iter(lambda: stream.read(_CHUNK_BYTES), b"")

    def _asking(self, what: str = "") -> Any:  # noqa: ANN401 - a context manager
        return asking(f"{self.url}{what}")

    def _require_free(self, files: Sequence[Artifact]) -> Mapping[str, int] | None:
        """Give what is there, None where that is nothing."""
        there = self.listing()
        name = str(files[-1].path)
        if not there:
            return None
        if name in there and self._holds(files[-1]):
            return there
        if (name in there or set(there) - {str(file.path) for file in files}) and not self._options.yes:
            what = "another release" if name in there else min(there)
            raise RevisionConflictError(
                f"{self.url}: holds {what}", hint="choose another prefix, or replace it with --yes"
            )
        return there if name in there else None

    def _holds(self, file: Artifact) -> bool:
        path = f"{self._prefix}/{file.path}"
        with self._asking(f"/{file.path}"):
            is_there = self._files.exists(path) and self._files.size(path) == file.n_bytes
        return is_there and self._sha256(str(file.path)) == file.sha256

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
            self._asking(f"/{file.path}"),
            (root / file.path).open("rb", buffering=0) as source,
            self._files.open(target, "wb") as sink,
        ):
            while piece := source.read(_CHUNK_BYTES):
                digest.update(piece)
                sink.write(piece)
        if digest.hexdigest() != file.sha256:
            with self._asking(f"/{file.path}"):
                self._files.rm_file(target)
            raise mismatch(root, file, digest.hexdigest())

    def _seal(self, root: Path, manifest: Artifact, *, is_new: bool) -> None:
        content = (root / manifest.path).read_bytes()
        if hashlib.sha256(content).hexdigest() != manifest.sha256:
            raise mismatch(root, manifest, hashlib.sha256(content).hexdigest())
        mode = "create" if is_new else "overwrite"
        with self._asking(f"/{manifest.path}"):
            try:
                self._files.pipe_file(f"{self._prefix}/{manifest.path}", content, mode=mode)
            except FileExistsError as error:
                raise RevisionConflictError(
                    f"{self.url}: somebody else released there meanwhile", hint="choose another prefix", code="moved"
                ) from error

    def _remove(self, paths: set[str]) -> None:
        for path in sorted(paths):
            with self._asking(f"/{path}"):
                self._files.rm_file(f"{self._prefix}/{path}")
