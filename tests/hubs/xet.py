"""What hf_xet wrote below a folder: the sha256 of whole files, and the hash that it calls them by.

Source: shards of hf_xet 1.8 (``xet/xorbs/shards/*.mdb``), read as they lie; their format is not documented, and tests
that read it are skipped for other versions. A header of 48 bytes; then, until a hash of ones, for each file 48 bytes
(hash, flags, number of entries) and its entries of 48 bytes, once more if they carry verification, and 48 bytes with
the sha256 if the flags say so.
"""

from __future__ import annotations

import struct
from importlib.metadata import version
from pathlib import Path

import pytest

_HEADER_BYTES = _ENTRY_BYTES = 48
_END = b"\xff" * 32
_HAS_VERIFICATION, _HAS_SHA256 = 0x80000000, 0x40000000

known_xet = pytest.mark.skipif(
    not (1, 4) <= tuple(int(part) for part in version("hf-xet").split(".")[:2]) < (1, 10),
    reason=f"needs an hf_xet whose files are known, found {version('hf-xet')}",
)


def stored_hashes(folder: Path) -> dict[str, str]:
    """Give the xet hash of every file that was stored, by sha256."""
    found: dict[str, str] = {}
    for shard in (folder / "xet" / "xorbs" / "shards").glob("*.mdb"):
        found |= _of_shard(shard.read_bytes())
    return found


def _of_shard(content: bytes) -> dict[str, str]:
    found = {}
    place = _HEADER_BYTES
    while (name := content[place : place + 32]) != _END:
        flags, n_entries = struct.unpack_from("<II", content, place + 32)
        place += _ENTRY_BYTES * (1 + n_entries * (2 if flags & _HAS_VERIFICATION else 1))
        if flags & _HAS_SHA256:
            found[_as_text(content[place : place + 32])] = _as_text(name)
            place += _ENTRY_BYTES
    return found


def _as_text(hashed: bytes) -> str:
    """Four words of eight bytes, little-endian."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", hashed))
