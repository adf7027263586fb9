"""What every hub does: take a release whole or not at all, say what it has, and give it back.

Promise: ``publish`` leaves the target as it was, or holding the whole release; ``read_back`` asks the hub itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol, runtime_checkable

from lora_deploy.artifact import Artifact, sha256_of
from lora_deploy.errors import DigestMismatchError
from lora_deploy.merge.progress import Progress

LEFT_BY_CLIENTS = (PurePosixPath(".gitattributes"), PurePosixPath(".cache/huggingface"))
"""What hubs and their clients leave beside a release; nothing else that a manifest does not name is let pass."""


def is_left_by_client(path: str) -> bool:
    """Whether a path is one of those, or below one."""
    return any(PurePosixPath(path).is_relative_to(left) for left in LEFT_BY_CLIENTS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """Where a release is now."""

    revision: str | None
    """Commit or digest; None where the hub has none."""
    url: str
    n_sent_bytes: int
    """Size of the files that the target lacked."""
    notes: tuple[str, ...] = ()
    pull_request: str | None = None
    """Its address, where one was opened."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """What a push would do."""

    url: str
    to_send: tuple[Artifact, ...]
    notes: tuple[str, ...] = ()


def require_unchanged(root: Path, files: Sequence[Artifact]) -> None:
    """Read files and compare them with what is listed.

    Raises:
        DigestMismatchError: One is another.
    """
    for file in files:
        found = sha256_of(root / file.path)
        if found != file.sha256:
            raise mismatch(root, file, found)


def mismatch(root: Path, file: Artifact, found: str) -> DigestMismatchError:
    """Say that a file is not the released one."""
    return DigestMismatchError(
        f"{root / file.path}: found sha256 {found}, expected {file.sha256}",
        hint="it was changed after the release was made: make it again",
    )


class Hub(Protocol):
    """A place that holds releases."""

    url: str
    """What to call it in messages; holds no secret."""

    def preview(self, root: Path, files: Sequence[Artifact]) -> Preview:
        """Say what a push would send; nothing is changed.

        Raises:
            PushError: The hub does not answer, or would refuse.
        """
        ...

    def publish(self, root: Path, files: Sequence[Artifact], title: str, progress: Progress | None) -> Published:
        """Publish files of ``root``, the manifest being the last of them, in one step.

        Raises:
            PushError: The hub did not take it; it holds what it held before.
            DigestMismatchError: A file is not the one listed, whether it had to be sent or not.
        """
        ...

    def read_back(self, root: Path, files: Sequence[Artifact], published: Published) -> Mapping[str, str]:
        """Ask the hub for the digest of every file, as ``sha256:…`` or ``git-sha1:…``, by path.

        Raises:
            PushError: The hub does not answer, or lacks a file.
        """
        ...

    def listing(self) -> Mapping[str, int]:
        """Give the size in bytes of everything there, by path.

        Raises:
            PushError: There is no such thing, or the hub does not answer.
        """
        ...

    def opened(self, path: str) -> AbstractContextManager[Iterator[bytes]]:
        """Read a file in pieces.

        Raises:
            PushError: The hub does not give it.
        """
        ...


@runtime_checkable
class Tags(Protocol):
    """A hub that can name what it was given, once that was read back."""

    def set_tag(self, published: Published) -> None:
        """Set the tag that the options ask for, if they do.

        Raises:
            PushError: It is at another release, or the hub does not set it.
        """
        ...
