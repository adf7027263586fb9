"""The byte layout of a safetensors file: read its header, format one, write a file whole or not at all.

Promise: no number in a header is believed before it was checked against the file: length, duplicate names, shapes that
overflow, ranges that overlap, leave holes or end outside the file. Tensor bytes are never touched by the reading half.
Source: the format section of the safetensors README, version 0.8.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import struct
from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lora_deploy.artifact import Artifact
from lora_deploy.errors import DiskSpaceError, InputError, MergeError
from lora_deploy.tensors import DType, TensorSpec

MAX_HEADER_BYTES = 100_000_000
_LENGTH_BYTES = 8
_ALIGNMENT = 8
_FLUSH_BYTES = 1 << 25
N_HASHED_BEHIND = 2
"""Chunks that are written and wait for the hasher, at most."""
_MAX_DIMENSION = 1 << 48
_OTHER_FORMATS = {b"PK\x03\x04": "a zip archive, as torch.save writes", b"GGUF": "a GGUF file", b"\x80\x02": "a pickle"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a safetensors file says about itself, checked."""

    tensors: Mapping[str, TensorSpec]
    """In the order of their bytes."""
    metadata: Mapping[str, str]
    start: int
    """Byte of the file at which the data section begins."""


class NotSafetensorsError(InputError):
    """The bytes are no valid safetensors file; adapters and checkpoints re-raise it under their own name."""


def read_header(path: Path, *, file: str | None = None) -> Header:
    """Read and check the header; ``file`` is the name that the specs carry (the path's own name by default).

    Raises:
        NotSafetensorsError: Anything in the file contradicts the format.
    """
    try:
        with path.open("rb") as stream:
            n_file_bytes = os.fstat(stream.fileno()).st_size
            prefix = stream.read(_LENGTH_BYTES)
            n_header_bytes = _header_length(path, prefix, n_file_bytes)
            raw = stream.read(n_header_bytes)
    except OSError as error:
        raise NotSafetensorsError(f"{path}: cannot be read: {error.strerror or error}") from error
    entries = _parse(path, raw)
    metadata = _metadata(path, entries.pop("__metadata__", None))
    start = _LENGTH_BYTES + n_header_bytes
    specs = [_spec(path, file or path.name, name, entry) for name, entry in entries.items()]
    specs.sort(key=lambda spec: (spec.start, spec.stop))
    _check_cover(path, specs, n_file_bytes - start)
    return Header(tensors={spec.name: spec for spec in specs}, metadata=metadata, start=start)


def format_header(specs: Iterable[TensorSpec], metadata: Mapping[str, str] | None = None) -> bytes:
    """Format the length prefix and the header of a file whose data section holds these tensors.

    The header is padded with spaces to a multiple of 8 bytes, as the reference writer does.
    """
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    for spec in specs:
        entries[spec.name] = {
            "dtype": spec.dtype.value,
            "shape": list(spec.shape),
            "data_offsets": [spec.start, spec.stop],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def write_file(path: Path, header: bytes, chunks: Iterable[memoryview], *, root: Path) -> Artifact:
    """Write header and chunks to a sibling temporary file, hash, flush to disk, rename.

    A failure leaves neither the file nor the temporary one. ``root`` is the folder that the artifact's path is
    relative to.

    Raises:
        DiskSpaceError: The file system is full, or a file size limit was reached.
        MergeError: The file cannot be written for another reason.
    """
    # By process and chance: tasks on several machines may write one file on a file system that they share.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    digest = hashlib.sha256(header)
    n_bytes, n_flushing = len(header), 0
    hashing: deque[Future[None]] = deque()
    try:
        try:
            with temporary.open("wb", buffering=0) as stream, ThreadPoolExecutor(1, "hash") as hasher:
                descriptor = stream.fileno()
                write_all(descriptor, memoryview(header))
                for chunk in chunks:
                    hashing.append(hasher.submit(digest.update, chunk))  # while the system copies or the disk lags
                    write_all(descriptor, chunk)
                    if len(hashing) > N_HASHED_BEHIND:
                        hashing.popleft().result()
                    n_bytes += chunk.nbytes
                    n_flushing = _begin_flush(descriptor, n_flushing, n_bytes)
                os.fsync(descriptor)  # leaving the block waits for the hasher
            temporary.replace(path)
            sync_folder(path.parent)
        except OSError as error:
            raise writing_error(path, error) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return Artifact(PurePosixPath(path.relative_to(root).as_posix()), n_bytes, digest.hexdigest())


def _begin_flush(descriptor: int, start: int, stop: int) -> int:
    """Let the disk begin with what was written, so that the final flush finds little left; give where to go on.

    Linux starts writing back a range that it is advised not to keep, and keeps what is still dirty.
    """
    if stop - start < _FLUSH_BYTES or not hasattr(os, "posix_fadvise"):
        return start
    os.posix_fadvise(descriptor, start, stop - start, os.POSIX_FADV_DONTNEED)
    return stop


def write_all(descriptor: int, chunk: memoryview) -> None:
    """Write every byte of a contiguous buffer, however many calls the system needs."""
    rest = chunk.cast("B") if chunk.nbytes else chunk
    while rest.nbytes:
        rest = rest[os.write(descriptor, rest) :]


def sync_folder(folder: Path) -> None:
    """Make a rename in this folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def writing_error(path: Path, error: OSError) -> MergeError:
    """Say which of our errors a failed write is."""
    import errno

    reason = error.strerror or str(error)
    if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return DiskSpaceError(f"{path}: cannot be written: {reason}", hint="free some space or choose another -o")
    return MergeError(f"{path}: cannot be written: {reason}", hint="choose another -o")


def find_stand_in(prefix: bytes) -> tuple[str, str] | None:
    """Say what lies in the place of a file, given its first bytes, and what to do about it; None when nothing is wrong.

    ``prefix`` is the file's first 8 bytes or more, all of it when it is shorter.
    """
    if not prefix:
        return "the file is empty", "download the file again"
    if prefix.startswith(b"version "):
        return "is a git LFS pointer, not the file itself", "fetch the real file: git lfs pull"
    # No NUL: the length 15392 of a sound header reads " <" followed by six of them.
    if prefix.lstrip()[:1] == b"<" and b"\0" not in prefix:
        return "is an HTML page, not the file itself", "download the file again"
    return None


def _header_length(path: Path, prefix: bytes, n_file_bytes: int) -> int:
    stand_in = find_stand_in(prefix)
    if stand_in:
        raise NotSafetensorsError(f"{path}: {stand_in[0]}", hint=stand_in[1])
    if len(prefix) < _LENGTH_BYTES:
        raise NotSafetensorsError(f"{path}: {n_file_bytes} bytes are too few for a safetensors file")
    (length,) = struct.unpack("<Q", prefix)
    other = next((name for magic, name in _OTHER_FORMATS.items() if prefix.startswith(magic)), None)
    if other and _LENGTH_BYTES + length > n_file_bytes:
        raise NotSafetensorsError(f"{path}: not a safetensors file: it is {other}")
    if length > MAX_HEADER_BYTES:
        raise NotSafetensorsError(
            f"{path}: not a safetensors file: header length {length}, at most {MAX_HEADER_BYTES} is allowed"
        )
    if _LENGTH_BYTES + length > n_file_bytes:
        raise NotSafetensorsError(
            f"{path}: truncated: the header needs {_LENGTH_BYTES + length} bytes, the file has {n_file_bytes}"
        )
    return int(length)


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise NotSafetensorsError(f"{path}: header names {twice!r} twice")
        return entries

    try:
        entries = json.loads(raw.decode(), object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        raise NotSafetensorsError(f"{path}: header is not valid JSON: {error}") from error
    if not isinstance(entries, dict):
        raise NotSafetensorsError(f"{path}: header is not a JSON object")
    return entries


def _metadata(path: Path, value: object) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise NotSafetensorsError(f"{path}: __metadata__ is not a map from strings to strings")
    return dict(value)


def _spec(path: Path, file: str, name: str, entry: object) -> TensorSpec:
    try:
        dtype = DType(entry["dtype"])  # type: ignore[index]
        shape = tuple(entry["shape"])  # type: ignore[index]
        start, stop = entry["data_offsets"]  # type: ignore[index]
    except (KeyError, TypeError, ValueError) as error:
        raise NotSafetensorsError(f"{path}: {name}: entry is malformed: {error}") from error
    if not all(type(number) is int and 0 <= number < _MAX_DIMENSION for number in (*shape, start, stop)):
        raise NotSafetensorsError(f"{path}: {name}: shape {shape} or offsets [{start}, {stop}] are no sizes")
    expected = math.prod(shape) * dtype.n_bytes
    if stop - start != expected:
        raise NotSafetensorsError(
            f"{path}: {name}: offsets [{start}, {stop}] hold {stop - start} bytes, "
            f"{dtype.value} {list(shape)} needs {expected}"
        )
    return TensorSpec(name=name, dtype=dtype, shape=shape, file=file, start=start, stop=stop)


def _check_cover(path: Path, specs: list[TensorSpec], n_data_bytes: int) -> None:
    end = 0
    for spec in specs:
        if spec.start != end:
            fault = "overlaps the tensor before it" if spec.start < end else "leaves a hole before it"
            raise NotSafetensorsError(f"{path}: {spec.name}: starts at byte {spec.start}, expected {end}: {fault}")
        end = spec.stop
    if end != n_data_bytes:
        fault = "truncated" if end > n_data_bytes else "has bytes that no tensor owns"
        raise NotSafetensorsError(f"{path}: {fault}: the header needs {end} data bytes, the file has {n_data_bytes}")
