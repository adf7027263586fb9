"""A folder on a file system that is mounted here: for air gaps, shared disks and CI artifacts.

Promise: the folder is what it was, or the whole release, after a kill at any byte. A release that is there already is
found by its manifest; another one is replaced only on request, by one rename.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from lora_deploy.artifact import Artifact, sha256_of
from lora_deploy.errors import MergeError, PushError, RecipeError, RevisionConflictError, UnsafeFileError
from lora_deploy.hubs.interface import Preview, Published, is_left_by_client, mismatch, require_unchanged
from lora_deploy.hubs.options import PushOptions
from lora_deploy.merge.output import WORK_FOLDER, abandon, locked, publish, remove, tidy
from lora_deploy.merge.progress import Progress, reporting
from lora_deploy.safetensors_file import write_file

_CHUNK_BYTES = 1 << 22


class Folder:
    """A folder as a target."""

    def __init__(self, path: Path, options: PushOptions) -> None:
        """Touch nothing yet."""
        self._path = path.resolve()
        self._options = options
        self.url = self._path.as_uri()

    def preview(self, root: Path, files: Sequence[Artifact]) -> Preview:
        """Compare with what is there."""
        self._require_apart(root)
        if self._holds(files):
            return Preview(url=self.url, to_send=(), notes=("it holds this release already",))
        self._require_free()
        notes = ("what is there would be replaced",) if self._path.is_dir() and any(self._path.iterdir()) else ()
        return Preview(url=self.url, to_send=tuple(files), notes=notes)

    def publish(self, root: Path, files: Sequence[Artifact], title: str, progress: Progress | None) -> Published:
        """Copy beside the target, flush, rename."""
        self._require_apart(root)
        if self._holds(files):
            require_unchanged(root, files)
            return Published(revision=None, url=self.url, n_sent_bytes=0, notes=("it held this release already",))
        self._require_free()
        n_sent = 0
        try:
            with locked(self._path) as partial:
                wanted = {str(file.path) for file in files}
                for path in [p for p in partial.rglob("*") if p.is_file() and WORK_FOLDER not in p.parts]:
                    if path.relative_to(partial).as_posix() not in wanted:
                        remove(path)
                with reporting(progress, "copying", sum(file.n_bytes for file in files)) as advance:
                    for file in files:
                        n_sent += _copy(root, file, partial)
                        advance(file.n_bytes)
                if not any(partial.iterdir()):
                    abandon(partial)
                publish(partial, self._path)
            tidy(self._path)
        except MergeError as error:
            hint = error.hint and error.hint.replace("-o", "folder")
            raise PushError(error.message, hint=hint, code=error.code) from error
        return Published(revision=None, url=self.url, n_sent_bytes=n_sent)

    def read_back(self, root: Path, files: Sequence[Artifact], published: Published) -> Mapping[str, str]:
        """Hash what is there."""
        return {str(file.path): f"sha256:{sha256_of(self._path / file.path)}" for file in files}

    def listing(self) -> Mapping[str, int]:
        """List everything that is no folder; a link is listed, and cannot be opened."""
        if not self._path.is_dir():
            raise PushError(f"{self.url}: no such folder", hint="check the path", code="not-found")
        found: dict[str, int] = {}
        for folder, folders, names in os.walk(self._path):
            links = [name for name in folders if (Path(folder) / name).is_symlink()]
            for name in (*names, *links):
                path = Path(folder) / name
                relative = path.relative_to(self._path)
                if relative.parts[0] != WORK_FOLDER:  # left by a push that was killed just after its rename
                    found[relative.as_posix()] = path.lstat().st_size
        return found

    @contextmanager
    def opened(self, path: str) -> Iterator[Iterator[bytes]]:
        """Read a file in pieces of 4 MiB."""
        place = self._path / path
        if place.is_symlink():
            raise UnsafeFileError(f"{place}: is a link, expected a file", hint="a release holds its files themselves")
        try:
            with place.open("rb", buffering=0) as stream:
                yield iter(lambda: stream.read(_CHUNK_BYTES), b"")
        except OSError as error:
            raise PushError(f"{self.url}/{path}: cannot be read: {error.strerror}") from error

    def _holds(self, files: Sequence[Artifact]) -> bool:
        """Whether the whole release is there and nothing else; the manifest, written last, is looked at first."""
        if not self._path.is_dir():
            return False
        there = {path for path in self.listing() if not is_left_by_client(path)}
        return there == {str(file.path) for file in files} and all(
            (path := self._path / file.path).is_file()
            and not path.is_symlink()
            and path.stat().st_size == file.n_bytes
            and sha256_of(path) == file.sha256
            for file in reversed(files)
        )

    def _require_apart(self, root: Path) -> None:
        source = root.resolve()
        if self._path.is_relative_to(source) or source.is_relative_to(self._path):
            raise RecipeError(
                f"{self._path}: is the release itself, or one lies in the other", hint="choose another folder"
            )

    def _require_free(self) -> None:
        if self._path.is_dir() and any(self._path.iterdir()) and not self._options.yes:
            raise RevisionConflictError(
                f"{self.url}: holds something else",
                hint="choose another folder, or replace all of it with --yes",
                code="holds-other",
            )
        if os.path.lexists(self._path) and not self._path.is_dir():
            raise RevisionConflictError(f"{self.url}: is no folder", hint="choose another one", code="holds-other")


def _copy(root: Path, file: Artifact, partial: Path) -> int:
    """Copy a file unless it is there; give the bytes written."""
    target = partial / file.path
    if target.is_file() and target.stat().st_size == file.n_bytes and sha256_of(target) == file.sha256:
        return 0
    target.parent.mkdir(parents=True, exist_ok=True)
    with (root / file.path).open("rb", buffering=0) as stream:
        chunks = (memoryview(chunk) for chunk in iter(lambda: stream.read(_CHUNK_BYTES), b""))
        written = write_file(target, b"", chunks, root=partial)
    if written.sha256 != file.sha256:
        target.unlink()
        raise mismatch(root, file, written.sha256)
    return written.n_bytes
