"""Where an export's weights lie: every floating initializer as a run of bytes in a file of the export's folder.

Promise: no file outside the folder is opened, and no place is believed before it was checked against the file and the
initializer's own size. Two initializers have the same bytes or none in common.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from lora_deploy.checkpoint import contained_path
from lora_deploy.errors import MalformedCheckpointError
from lora_deploy.export.existing.inline import inline_positions
from lora_deploy.export.extras import require_onnx
from lora_deploy.tensors import DType

_FLOATING = {"FLOAT": DType.F32, "FLOAT16": DType.F16, "BFLOAT16": DType.BF16, "DOUBLE": DType.F64}


@dataclass(frozen=True, slots=True, order=True)
class Run:
    """The bytes of an initializer; several initializers, of one graph or of many, may have one."""

    file: str
    offset: int
    n_bytes: int
    dtype: DType
    shape: tuple[int, ...]


def runs_of(root: Path, file: str, model: Any) -> dict[str, Run]:  # noqa: ANN401 - an onnx.ModelProto
    """Locate the floating initializers of a graph; those that are no run of bytes (packed integers) are left out.

    Raises:
        UnsafeFileError: A place is outside the folder.
        MalformedCheckpointError: A file is missing or too short, or the length contradicts shape and dtype.
    """
    onnx = require_onnx()
    inline: Mapping[str, tuple[int, int]] | None = None
    runs = {}
    for tensor in model.graph.initializer:
        dtype = _FLOATING.get(onnx.TensorProto.DataType.Name(tensor.data_type))
        if dtype is None:
            continue
        shape = tuple(tensor.dims)
        if any(size < 0 for size in shape):
            raise MalformedCheckpointError(f"{root / file}: {tensor.name}: found shape {shape}, expected sizes")
        n_bytes = dtype.n_bytes * math.prod(shape)
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            runs[tensor.name] = _external(root, file, tensor, Run("", 0, n_bytes, dtype, shape))
            continue
        inline = inline_positions(root / file) if inline is None else inline
        offset, length = inline.get(tensor.name, (0, -1))
        if length == n_bytes:
            runs[tensor.name] = Run(file, offset, n_bytes, dtype, shape)
    return runs


def _external(root: Path, graph: str, tensor: Any, wanted: Run) -> Run:  # noqa: ANN401 - an onnx.TensorProto
    places = {entry.key: entry.value for entry in tensor.external_data}
    path = contained_path(root, places.get("location", ""))
    where = f"{root / graph}: {tensor.name}"
    try:
        offset, length = int(places.get("offset", 0)), int(places.get("length", wanted.n_bytes))
    except ValueError as error:
        raise MalformedCheckpointError(f"{where}: its place in {path.name} is no number: {places}") from error
    size = path.stat().st_size
    if offset < 0 or length != wanted.n_bytes:
        kind = f"{wanted.dtype.value} {list(wanted.shape)}"
        problem = f"bytes {offset} to {offset + length} of {path.name} for {kind}, which needs {wanted.n_bytes}"
        raise MalformedCheckpointError(f"{where}: {problem}")
    if offset + length > size:
        problem = f"bytes {offset} to {offset + length} of {path.name}, which has {size}"
        raise MalformedCheckpointError(f"{where}: {problem}", hint="the download may be incomplete; fetch it again")
    return Run(path.relative_to(root).as_posix(), offset, length, wanted.dtype, wanted.shape)


def refuse_overlaps(root: Path, runs: Iterable[Run]) -> None:
    """Check that runs are equal or apart: to change one must not change another.

    Raises:
        MalformedCheckpointError: Two overlap.
    """
    for before, after in pairwise(sorted(run for run in set(runs) if run.n_bytes)):
        if before.file == after.file and after.offset < before.offset + before.n_bytes:
            problem = f"bytes {after.offset} on belong to two initializers, {before.shape} and {after.shape}"
            raise MalformedCheckpointError(f"{root / after.file}: {problem}")
