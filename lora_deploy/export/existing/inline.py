"""Find the bytes of weights that a graph file holds itself.

A graph is never written anew: weights are replaced where they lie, so the position of their bytes is needed, which the
onnx package does not tell. Only as much of the wire format is read as leads there.
Source: onnx 1.23 ``onnx.proto`` (field numbers), protobuf's encoding (wire types).
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from lora_deploy.errors import InputError

_GRAPH_OF_MODEL = 7
_INITIALIZER_OF_GRAPH = 5
_FLOATS_OF_TENSOR, _NAME_OF_TENSOR, _RAW_OF_TENSOR = 4, 8, 9
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def inline_positions(path: Path) -> dict[str, tuple[int, int]]:
    """Give first byte and length, in the file, of every initializer that is one run of plain little-endian values.

    Raises:
        InputError: The file ends within a message.
    """
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        try:
            return dict(_positions(content))
        except IndexError as error:
            raise InputError(f"{path}: is not an ONNX graph: it ends within a message") from error


def _positions(content: mmap.mmap) -> Iterator[tuple[str, tuple[int, int]]]:
    for graph, start, stop in _fields(content, 0, len(content)):
        if graph == _GRAPH_OF_MODEL:
            for field, first, last in _fields(content, start, stop):
                if field == _INITIALIZER_OF_GRAPH:
                    name, runs = _tensor(content, first, last)
                    if len(runs) == 1:
                        yield name, runs[0]


def _tensor(content: mmap.mmap, start: int, stop: int) -> tuple[str, list[tuple[int, int]]]:
    name, runs = "", []
    for field, first, last in _fields(content, start, stop):
        if field == _NAME_OF_TENSOR:
            name = content[first:last].decode(errors="replace")
        elif field in {_RAW_OF_TENSOR, _FLOATS_OF_TENSOR} and last > first:
            runs.append((first, last - first))
    return name, runs


def _fields(content: mmap.mmap, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Number, first byte and end of every field of a message that has a length; the others are passed over."""
    while start < stop:
        key, start = _varint(content, start)
        kind = key & 7
        if kind == _BYTES:
            length, start = _varint(content, start)
            if start + length > stop:
                raise IndexError
            yield key >> 3, start, start + length
            start += length
        elif kind == _VARINT:
            _, start = _varint(content, start)
        elif kind in {_FIXED32, _FIXED64}:
            start += 4 if kind == _FIXED32 else 8
        else:
            raise IndexError


def _varint(content: mmap.mmap, start: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        byte = content[start]
        start += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, start
