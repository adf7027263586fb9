"""Tensors of one adapter file: mapped from safetensors, or unpickled without running anything.

Promise: a safetensors header is checked against the file before a byte is mapped; a pickle is read with
``weights_only=True`` or not at all; what comes back is tensors by name and nothing else.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lora_deploy.errors import MalformedAdapterError
from lora_deploy.safetensors_file import NotSafetensorsError, read_header
from lora_deploy.tensors import TensorSpec
from lora_deploy.torch_file import TORCH_SUFFIXES, NotTorchFileError, read_state_dict

SAFETENSORS_SUFFIX = ".safetensors"
PICKLE_SUFFIXES = TORCH_SUFFIXES | {".lora"}


def read_tensors(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """Read all tensors of a file and its header's metadata (empty for a pickle).

    Raises:
        MalformedAdapterError: Neither format, damaged, or not a map from names to tensors.
        UnsafeFileError: A pickle that would run code.
    """
    metadata: Mapping[str, str] = {}
    if path.suffix in PICKLE_SUFFIXES:
        tensors = _unpickle(path)
    else:
        tensors, metadata = _map_safetensors(path)
    if not tensors:
        raise MalformedAdapterError(f"{path}: holds no tensors", hint="save the adapter again; training wrote nothing")
    return tensors, metadata


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
        return read_state_dict(path)
    except NotTorchFileError as error:
        raise MalformedAdapterError(error.message, hint=error.hint) from error
