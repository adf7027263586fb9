"""NumPy's ``.npz``: a zip archive of arrays, as MLX's trainers and ONNX Runtime GenAI's builder write adapters.

Promise: no member is unpickled; an array is read only when its header agrees with its size in the archive. MLX stores
bfloat16, which NumPy does not have, as two raw bytes (``V2``): they are read as bfloat16.
Source: NEP 1, the ``.npy`` format; mlx 0.32, ``mx.savez``.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from lora_deploy.adapters.containers import one_line
from lora_deploy.errors import MalformedAdapterError, UnsafeFileError

_RAW_BFLOAT16 = np.dtype("V2")
_BFLOAT16_NAME = "bfloat16"
_READABLE = frozenset("fiub")
_MEMBER_SUFFIX = ".npy"


def read_npz(path: Path) -> dict[str, Tensor]:
    """Read every array of an archive.

    Raises:
        MalformedAdapterError: No such archive, damaged, or an array of a type that no tensor has.
        UnsafeFileError: An array of Python objects, which is a pickle.
    """
    tensors: dict[str, Tensor] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                name = member.filename.removesuffix(_MEMBER_SUFFIX)
                if name in tensors:
                    raise MalformedAdapterError(f"{path}: {name}: is in the archive twice")
                with archive.open(member) as stream:
                    tensors[name] = _read_array(path, name, stream, member.file_size)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise MalformedAdapterError(f"{path}: not a readable npz file: {one_line(error)}") from error
    except OSError as error:
        raise MalformedAdapterError(f"{path}: cannot be read: {error.strerror or error}") from error
    return tensors


def _read_array(path: Path, name: str, stream: IO[bytes], n_member_bytes: int) -> Tensor:
    version = npy.read_magic(stream)
    read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
    if read_header is None:
        raise MalformedAdapterError(f"{path}: {name}: npy version {version[0]}.{version[1]}, expected 1.0 or 2.0")
    shape, is_fortran, dtype = read_header(stream)
    if dtype.hasobject:
        raise UnsafeFileError(f"{path}: {name}: an array of Python objects: reading it would run a pickle")
    is_bfloat16 = dtype == _RAW_BFLOAT16 or dtype.name == _BFLOAT16_NAME
    if dtype.kind not in _READABLE and not is_bfloat16:
        raise MalformedAdapterError(f"{path}: {name}: found dtype {dtype}, expected numbers")
    n_bytes = math.prod(shape) * dtype.itemsize
    if stream.tell() + n_bytes != n_member_bytes:
        raise MalformedAdapterError(
            f"{path}: {name}: shape {shape} of {dtype} needs {n_bytes} bytes, "
            f"the archive holds {n_member_bytes - stream.tell()}"
        )
    values = np.frombuffer(bytearray(stream.read(n_bytes)), np.uint16 if is_bfloat16 else dtype)
    values = values.reshape(shape, order="F" if is_fortran else "C")
    native = np.ascontiguousarray(values.astype(values.dtype.newbyteorder("="), copy=False)).reshape(shape)
    try:
        tensor = torch.from_numpy(native)
    except TypeError as error:
        raise MalformedAdapterError(f"{path}: {name}: found dtype {dtype}, which no tensor has") from error
    return tensor.view(torch.bfloat16) if is_bfloat16 else tensor
