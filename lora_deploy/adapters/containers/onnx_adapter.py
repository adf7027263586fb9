"""ONNX Runtime's ``.onnx_adapter``: a FlatBuffer of named parameters.

    root  0 format_version i32 · 1 adapter_version i32 · 2 model_version i32 · 3 parameters [table]
    parameter  0 name string · 1 dims [i64] · 2 data_type i32 (ONNX) · 3 raw_data [u8], little endian

Read here rather than by onnxruntime, which an installation that only merges need not have, and whose values point into
the file without asking whether their dims fit their bytes. The law: what onnxruntime writes and this reads is equal.
Source: onnxruntime 1.32, ``onnxruntime/lora/adapter_format/adapter_schema.fbs``; FlatBuffers binary format.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lora_deploy.errors import MalformedAdapterError

MAGIC = b"TORT"
"""At bytes 4 to 8."""
_FORMAT_VERSION = 1
_DTYPES = {1: torch.float32, 10: torch.float16, 11: torch.float64, 16: torch.bfloat16}
"""By ONNX' ``TensorProto.DataType``; what else adapters hold (quantised factors) is refused by its number."""


def read_onnx_adapter(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read every parameter of a file, and its versions as metadata.

    Raises:
        MalformedAdapterError: Damaged, of another version, or with a parameter that is no floating-point tensor.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise MalformedAdapterError(f"{path}: cannot be read: {error.strerror or error}") from error
    if content[4:8] != MAGIC:
        raise MalformedAdapterError(f"{path}: not an ONNX Runtime adapter: no {MAGIC.decode()} at bytes 4 to 8")
    try:
        root = _Table(content, _offset(content, 0))
        version = root.int32(0)
        if version != _FORMAT_VERSION:
            raise MalformedAdapterError(f"{path}: format version {version}, expected {_FORMAT_VERSION}")
        tensors: dict[str, Tensor] = {}
        for parameter in root.tables(3):
            name = parameter.string(0)
            if name in tensors:
                raise MalformedAdapterError(f"{path}: {name}: is in the file twice")
            tensors[name] = _tensor(path, name, parameter)
    except (struct.error, IndexError, UnicodeDecodeError, ValueError) as error:
        raise MalformedAdapterError(f"{path}: damaged ONNX Runtime adapter: {error}") from error
    return tensors, {"adapter_version": str(root.int32(1)), "model_version": str(root.int32(2))}


def _tensor(path: Path, name: str, parameter: _Table) -> Tensor:
    dtype = _DTYPES.get(parameter.int32(2))
    if dtype is None:
        raise MalformedAdapterError(
            f"{path}: {name}: ONNX data type {parameter.int32(2)}, expected a floating-point type",
            hint="quantised adapters (Olive) hold no exact factors: export the adapter without quantisation",
        )
    shape, raw = parameter.int64s(1), parameter.bytes(3)
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(raw):
        raise MalformedAdapterError(
            f"{path}: {name}: shape {shape} of {str(dtype).removeprefix('torch.')} does not fit its {len(raw)} bytes"
        )
    if not raw:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(raw), dtype=dtype).reshape(shape)


@dataclass(frozen=True, slots=True)
class _Table:
    """One table of a FlatBuffer: its fields lie where its vtable says, or are absent."""

    content: bytes
    start: int

    def _field(self, number: int) -> int | None:
        vtable = self.start - int(struct.unpack_from("<i", self.content, self.start)[0])
        if vtable < 0:
            raise ValueError("a vtable before the file's start")
        (size,) = struct.unpack_from("<H", self.content, vtable)
        entry = 4 + 2 * number
        if entry + 2 > size:
            return None
        (offset,) = struct.unpack_from("<H", self.content, vtable + entry)
        return self.start + int(offset) if offset else None

    def int32(self, number: int) -> int:
        at = self._field(number)
        return 0 if at is None else int(struct.unpack_from("<i", self.content, at)[0])

    def _vector(self, number: int) -> tuple[int, int]:
        """Position of the first element and their number."""
        at = self._field(number)
        if at is None:
            return 0, 0
        start = at + _offset(self.content, at)
        return start + 4, _offset(self.content, start)

    def bytes(self, number: int) -> memoryview:
        start, length = self._vector(number)
        if start + length > len(self.content):
            raise IndexError("a vector reaches beyond the file's end")
        return memoryview(self.content)[start : start + length]

    def string(self, number: int) -> str:
        return str(self.bytes(number), "utf-8")

    def int64s(self, number: int) -> tuple[int, ...]:
        start, length = self._vector(number)
        if start + 8 * length > len(self.content):
            raise IndexError("a vector reaches beyond the file's end")
        return struct.unpack_from(f"<{length}q", self.content, start)

    def tables(self, number: int) -> Iterator[_Table]:
        start, length = self._vector(number)
        for k in range(length):
            at = start + 4 * k
            yield _Table(self.content, at + _offset(self.content, at))


def _offset(content: bytes, at: int) -> int:
    return int(struct.unpack_from("<I", content, at)[0])
