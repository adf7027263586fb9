"""Bring files into a release: shared with their origin where the file system can, else copied, never linked by name.

Promise: the digest that is given is of the bytes that are there.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from contextlib import suppress
from pathlib import Path

from lora_deploy.artifact import cached_sha256
from lora_deploy.errors import ReleaseError
from lora_deploy.merge.record import RecordedFile
from lora_deploy.safetensors_file import write_file

_FICLONE = 0x40049409
"""Linux: make a file share another's blocks until one of them is written."""


def placed(source: Path, name: str, folder: Path, target: str) -> RecordedFile:
    """Bring a file into the release and say what it is.

    Raises:
        ReleaseError: It is not there.
    """
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


def written(folder: Path, name: str, text: str) -> RecordedFile:
    """Write a file of the release and say what it is."""
    artifact = write_file(folder / name, text.encode(), (), root=folder)
    return RecordedFile(path=str(artifact.path), n_bytes=artifact.n_bytes, sha256=artifact.sha256)
