"""Tensors of one adapter file: mapped from safetensors, or unpickled without running anything.

Promise: a safetensors header is checked against the file before a byte is mapped; a pickle is read with
``weights_only=True`` or not at all; what comes back is tensors by name and nothing else.
"""

from __future__ import annotations

import mmap
import pickle
import pickletools
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_deploy.errors import MalformedAdapterError, UnsafeFileError
from lora_deploy.safetensors_file import NotSafetensorsError, find_stand_in, read_header
from lora_deploy.tensors import TensorSpec

SAFETENSORS_SUFFIX = ".safetensors"
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".lora"})

_WRAPPING_KEYS = ("state_dict", "model")
"""Lightning and litgpt save their tensors one level down."""
_RUNS_CODE = ("Unsupported global", "GLOBAL", "REDUCE", "Unsupported class", "not an allowed", "was blocked")


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
        with path.open("rb") as stream:
            stand_in = find_stand_in(stream.read(64))
        if stand_in:
            raise MalformedAdapterError(f"{path}: {stand_in[0]}", hint=stand_in[1])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # read or refused, whichever protocol
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError as error:
        raise MalformedAdapterError(f"{path}: cannot be read: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        raise _unpickling_error(path, error) from error
    except (RuntimeError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise MalformedAdapterError(f"{path}: not a readable torch file: {_first_line(error)}") from error
    return _state_dict(path, content)


def _unpickling_error(path: Path, error: pickle.UnpicklingError) -> MalformedAdapterError | UnsafeFileError:
    lines = [line.strip() for line in str(error).splitlines()]
    reasons = [line.removeprefix("WeightsUnpickler error:").strip() for line in lines if _names_code(line)]
    called = reasons[-1].partition(". ")[0] if reasons else _named_global(path)
    if called:
        return UnsafeFileError(
            f"{path}: a pickle that would run code: {called}",
            hint="ask its author for safetensors, or convert it where running its code does no harm",
        )
    return MalformedAdapterError(f"{path}: not a readable torch file", hint="download or save the file again")


def _names_code(line: str) -> bool:
    return any(sign in line for sign in _RUNS_CODE)


def _named_global(path: Path) -> str | None:
    """Look for a global in a plain pickle of a protocol that torch does not read; nothing is executed."""
    words: list[str] = []
    try:
        with path.open("rb") as stream:
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name in {"GLOBAL", "INST"}:
                    return f"it names {argument}"
                if opcode.name == "STACK_GLOBAL":
                    return f"it names {' '.join(words[-2:])}"
                if isinstance(argument, str):
                    words.append(argument)
    except (ValueError, OSError):
        return None
    return None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _state_dict(path: Path, content: Any) -> dict[str, Tensor]:  # noqa: ANN401 - a pickle holds anything
    if isinstance(content, Tensor):
        raise MalformedAdapterError(f"{path}: found one bare tensor of shape {tuple(content.shape)}, expected a dict")
    for key in _WRAPPING_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise MalformedAdapterError(f"{path}: found a {type(content).__name__}, expected a dict of tensors")
    others = [str(key) for key, value in content.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if others:
        raise MalformedAdapterError(
            f"{path}: {len(others)} of {len(content)} entries are not tensors, first {others[0]!r}",
            hint="expected a state dict: a map from names to tensors",
        )
    return {key: value.detach() for key, value in content.items()}
