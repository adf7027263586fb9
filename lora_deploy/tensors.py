"""What a stored tensor is: its number format and its place in a file. No tensor library is imported here.

Promise: names, sizes and ranges are those of the safetensors format, which every base is brought to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum


class DType(StrEnum):
    """A storage format, by its safetensors name."""

    F64 = "F64"
    F32 = "F32"
    F16 = "F16"
    BF16 = "BF16"
    F8_E5M2 = "F8_E5M2"
    F8_E4M3 = "F8_E4M3"
    F8_E8M0 = "F8_E8M0"
    C64 = "C64"
    I64 = "I64"
    I32 = "I32"
    I16 = "I16"
    I8 = "I8"
    U64 = "U64"
    U32 = "U32"
    U16 = "U16"
    U8 = "U8"
    BOOL = "BOOL"

    @property
    def n_bytes(self) -> int:
        """Size of one element in bytes."""
        return _N_BYTES[self]

    @property
    def is_floating(self) -> bool:
        """Whether this is one of the four formats a weight may be merged in."""
        return self in _FLOATING

    @property
    def long_name(self) -> str:
        """The tensor libraries' name, such as ``bfloat16``."""
        return _LONG_NAMES[self]

    @classmethod
    def from_long_name(cls, name: str) -> DType:
        """Find the format by the tensor libraries' name.

        Raises:
            KeyError: No format has that name.
        """
        return _BY_LONG_NAME[name.removeprefix("torch.")]


_N_BYTES = {
    DType.F64: 8,
    DType.F32: 4,
    DType.F16: 2,
    DType.BF16: 2,
    DType.F8_E5M2: 1,
    DType.F8_E4M3: 1,
    DType.F8_E8M0: 1,
    DType.C64: 8,
    DType.I64: 8,
    DType.I32: 4,
    DType.I16: 2,
    DType.I8: 1,
    DType.U64: 8,
    DType.U32: 4,
    DType.U16: 2,
    DType.U8: 1,
    DType.BOOL: 1,
}
_FLOATING = frozenset({DType.F64, DType.F32, DType.F16, DType.BF16})
_LONG_NAMES = {
    DType.F64: "float64",
    DType.F32: "float32",
    DType.F16: "float16",
    DType.BF16: "bfloat16",
    DType.F8_E5M2: "float8_e5m2",
    DType.F8_E4M3: "float8_e4m3fn",
    DType.F8_E8M0: "float8_e8m0fnu",
    DType.C64: "complex64",
    DType.I64: "int64",
    DType.I32: "int32",
    DType.I16: "int16",
    DType.I8: "int8",
    DType.U64: "uint64",
    DType.U32: "uint32",
    DType.U16: "uint16",
    DType.U8: "uint8",
    DType.BOOL: "bool",
}
_BY_LONG_NAME = {name: dtype for dtype, name in _LONG_NAMES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One tensor of a safetensors file: what it is and where its bytes lie."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: str
    """POSIX path relative to the checkpoint's root."""
    start: int
    """First byte, counted in the file's data section."""
    stop: int
    """End byte, excluded, counted in the file's data section."""

    @property
    def n_bytes(self) -> int:
        """Stored size in bytes."""
        return self.stop - self.start

    @property
    def n_elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def region(self) -> Region:
        """The whole tensor as a matrix: first axis by all others."""
        return Region.whole(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Region:
    """A contiguous run of a tensor's elements, seen as a row-major matrix.

    One expert of a stack (E, a, b) is ``Region(offset=e*a*b, n_rows=a, n_cols=b)``; rows p:q of a fused projection
    (out, in) are ``Region(offset=p*in, n_rows=q-p, n_cols=in)``; a convolution (out, in, *k) is (out, in*prod(k)).
    """

    offset: int
    """First element."""
    n_rows: int
    n_cols: int

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Region:
        """Cover a tensor of this shape: first axis by the product of the others; a scalar is one by one."""
        if not shape:
            return cls(offset=0, n_rows=1, n_cols=1)
        return cls(offset=0, n_rows=shape[0], n_cols=math.prod(shape[1:]))

    @property
    def stop(self) -> int:
        """End element, excluded."""
        return self.offset + self.n_rows * self.n_cols


@dataclass(frozen=True, slots=True)
class Place:
    """A region of a named tensor, to say in the tensor's own terms where something is."""

    name: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    region: Region

    def element(self, row: int, col: int) -> str:
        """Name an element of the region, such as ``w.weight: element [3, 0, 7]``."""
        rest, index = self.region.offset + row * self.region.n_cols + col, []
        for size in reversed(self.shape):
            rest, position = divmod(rest, size)
            index.append(position)
        return f"{self.name}: element {index[::-1]}"
