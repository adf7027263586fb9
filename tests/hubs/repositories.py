"""What a hub keeps: repositories with commits, branches, tags and pull requests, and large objects by digest."""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class Blob:
    """A file of a commit: small ones by content, large ones by the sha256 of their object."""

    size: int
    content: bytes | None = None
    sha256: str | None = None

    @property
    def oid(self) -> str:
        return git_blob(self.content if self.content is not None else self._pointer)

    @property
    def _pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()

    def to_json(self, path: str) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": self.size, "oid": self.oid}
        if self.sha256:
            entry["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": len(self._pointer)}
        return entry


@dataclass(frozen=True)
class Commit:
    id: str
    parent: str | None
    title: str
    files: dict[str, Blob]


@dataclass
class Repository:
    name: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    proposals: dict[str, str] = field(default_factory=dict)
    verified: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        attributes = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
        first = {".gitattributes": Blob(size=len(attributes), content=attributes)}
        self.branches["main"] = self.add(None, "initial commit", first)

    def add(self, parent: str | None, title: str, files: dict[str, Blob]) -> str:
        listed = sorted((path, blob.oid) for path, blob in files.items())
        key = hashlib.sha1(repr((parent, title, listed, len(self.commits))).encode(), usedforsecurity=False).hexdigest()
        self.commits[key] = Commit(key, parent, title, files)
        return key

    def resolve(self, revision: str) -> str | None:
        for refs in (self.branches, self.tags, self.proposals):
            if revision in refs:
                return refs[revision]
        return revision if revision in self.commits else None

    def history(self, revision: str) -> list[Commit]:
        found, current = [], self.resolve(revision)
        while current is not None:
            found.append(self.commits[current])
            current = self.commits[current].parent
        return found


@dataclass
class Store:
    """Everything, behind one lock."""

    folder: Path
    repositories: dict[str, Repository] = field(default_factory=dict)
    lock: Any = field(default_factory=threading.RLock)

    def object_path(self, sha256: str) -> Path:
        return self.folder / sha256

    def has_object(self, sha256: str) -> bool:
        return self.object_path(sha256).is_file()


def sha256_of(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
