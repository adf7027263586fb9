"""A file that was made or used: its path, size and digest.

Promise: a digest is of the bytes on disk. A digest taken before is reused only while the file's path, size,
modification time and inode are what they were; the cache (``$LORA_DEPLOY_CACHE/digests``) holds one small file a path,
written by rename.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True, slots=True, order=True)
class Artifact:
    """One file of a folder; ordering is the canonical listing."""

    path: PurePosixPath
    """Relative to the folder that lists it."""
    n_bytes: int
    sha256: str


def cache_root() -> Path:
    """Folder of everything that can be made again: ``$LORA_DEPLOY_CACHE`` or ``~/.cache/lora-deploy``."""
    chosen = os.environ.get("LORA_DEPLOY_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "lora-deploy"


def sha256_of(path: Path) -> str:
    """Hash a file's bytes, read in blocks of 4 MiB."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def known_sha256(path: Path) -> str | None:
    """Return the remembered digest if the file is unchanged by size, mtime and inode, else None."""
    try:
        entry = json.loads(_entry_path(path).read_text())
        return str(entry["sha256"]) if entry["stamp"] == _stamp(path) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def cached_sha256(path: Path) -> str:
    """Return the file's digest, from the cache when the file is unchanged, else by reading it."""
    known = known_sha256(path)
    if known is not None:
        return known
    before = _stamp(path)
    sha256 = sha256_of(path)
    if _stamp(path) == before:
        remember_sha256(path, sha256)
    return sha256


def remember_sha256(path: Path, sha256: str) -> None:
    """Keep a digest that was taken while writing or reading the file; a cache that cannot be written is no error."""
    entry = _entry_path(path)
    temporary = entry.with_suffix(f".{os.getpid()}.tmp")
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({"path": str(path), "stamp": _stamp(path), "sha256": sha256}))
        temporary.replace(entry)
    except OSError:
        temporary.unlink(missing_ok=True)


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev]


def _entry_path(path: Path) -> Path:
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()
    return cache_root() / "digests" / f"{name}.json"
