"""Tensors of one adapter file: mapped from safetensors, unpickled without running anything, or read from a container.

Promise: a safetensors header is checked against the file before a byte is mapped; a pickle is read with
``weights_only=True`` or not at all; what comes back is tensors by name, and what the file says about itself.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lora_deploy.adapters.containers import gguf, onnx_adapter
from lora_deploy.adapters.containers.npz import read_npz
from lora_deploy.adapters.interface import Container
from lora_deploy.errors import MalformedAdapterError
from lora_deploy.safetensors_file import NotSafetensorsError, read_header
from lora_deploy.tensors import TensorSpec
from lora_deploy.torch_file import TORCH_SUFFIXES, NotTorchFileError, read_state_dict

SAFETENSORS_SUFFIX = ".safetensors"
PICKLE_SUFFIXES = TORCH_SUFFIXES | {".lora"}
LIST_PART = "modules"
"""What the tensors of a bare list are numbered under: it has no name of its own."""


def read_tensors(path: Path) -> tuple[Container, dict[str, Tensor], Mapping[str, str]]:
    """Read all tensors of a file and its metadata (empty for a pickle), and say what kind of file it is.

    Raises:
        InputError: Of no known kind, damaged, not a map from names to tensors, or a package to read it is missing.
        UnsafeFileError: A pickle that would run code.
    """
    container = container_of(path)
    metadata: Mapping[str, str] = {}
    if container == "gguf":
        tensors, metadata = gguf.read_gguf(path)
    elif container == "onnx_adapter":
        tensors, metadata = onnx_adapter.read_onnx_adapter(path)
    elif container == "npz":
        tensors = read_npz(path)
    elif container == "pickle":
        tensors = _unpickle(path)
    else:
        tensors, metadata = _map_safetensors(path)
    if not tensors:
        raise MalformedAdapterError(f"{path}: holds no tensors", hint="save the adapter again; training wrote nothing")
    return container, tensors, metadata


def container_of(path: Path) -> Container:
    """Tell what kind of file it is: by its first bytes where they say it, else by its suffix.

    Raises:
        MalformedAdapterError: It cannot be read.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(8)
    except OSError as error:
        raise MalformedAdapterError(f"{path}: cannot be read: {error.strerror or error}") from error
    if start[:4] == gguf.MAGIC or (path.suffix == ".gguf" and not start):
        return "gguf"
    if start[4:] == onnx_adapter.MAGIC:
        return "onnx_adapter"
    if path.suffix == ".npz":
        return "npz"
    return "pickle" if path.suffix in PICKLE_SUFFIXES else "safetensors"


def _map_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        header = read_header(path)
    except NotSafetensorsError as error:
        raise MalformedAdapterError(error.message, hint=error.hint) from error
    with path.open("rb") as stream:
        # ACCESS_COPY: torch wants a writable buffer; nobody writes, so no page is ever copied.
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    tensors = {name: _view(mapped, header.start, spec) for name, spec in header.tensors.items()}
    return tensors, dict(header.metadata)


def _view(mapped: mmap.mmap, data_start: int, spec: TensorSpec) -> Tensor:
    dtype = getattr(torch, spec.dtype.long_name)
    if not spec.n_elements:
        return torch.empty(spec.shape, dtype=dtype)
    start = data_start + spec.start
    if start % spec.dtype.n_bytes:  # headers of old writers are not padded: such a tensor has to be moved
        return torch.frombuffer(bytearray(mapped[start : start + spec.n_bytes]), dtype=dtype).reshape(spec.shape)
    return torch.frombuffer(mapped, dtype=dtype, count=spec.n_elements, offset=start).reshape(spec.shape)


def _unpickle(path: Path) -> dict[str, Tensor]:
    try:
        return read_state_dict(path, pairs_of=LIST_PART)
    except NotTorchFileError as error:
        raise MalformedAdapterError(error.message, hint=error.hint) from error
