"""Tensors by name into one safetensors file, whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lora_deploy.artifact import Artifact
from lora_deploy.errors import OutputExistsError
from lora_deploy.merge.shard import bytes_of
from lora_deploy.rounding import dtype_of
from lora_deploy.safetensors_file import format_header, write_file
from lora_deploy.tensors import TensorSpec


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Artifact:
    """Write tensors in the order of their names.

    Raises:
        DiskSpaceError, MergeError: The file cannot be written.
    """
    specs, start = [], 0
    ordered = dict(sorted(tensors.items()))
    for name, tensor in ordered.items():
        stop = start + tensor.nbytes
        shape = tuple(tensor.shape)
        specs.append(TensorSpec(name=name, dtype=dtype_of(tensor), shape=shape, file=path.name, start=start, stop=stop))
        start = stop
    chunks = (bytes_of(tensor) for tensor in ordered.values())
    return write_file(path, format_header(specs, metadata), chunks, root=path.parent)


def require_free(path: Path) -> None:
    """Check that nothing is in the way.

    Raises:
        OutputExistsError: Something is.
    """
    if path.exists() or path.is_symlink():
        raise OutputExistsError(f"{path}: exists already", hint="remove it, or choose another place with -o")
