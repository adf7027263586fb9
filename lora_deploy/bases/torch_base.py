"""Bases pickled by torch (``pytorch_model.bin``, its shards, a lone ``.pt``), converted once into a safetensors folder.

Promise: values are copied bit by bit; tensors that share their bytes as a known tie are stored once; the folder appears
whole or not at all, named by the digests of what it was made from. Nothing in the pickle is run.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lora_deploy.artifact import cached_sha256
from lora_deploy.bases.cache import companions_of, made_once, write_index
from lora_deploy.checkpoint import contained_path, read_json
from lora_deploy.errors import MalformedCheckpointError
from lora_deploy.names import NameIndex, ties_of
from lora_deploy.safetensors_file import format_header, write_file
from lora_deploy.tensors import DType, TensorSpec
from lora_deploy.torch_file import NotTorchFileError, read_state_dict

INDEX_NAME = "pytorch_model.bin.index.json"
SINGLE_NAME = "pytorch_model.bin"


def torch_files_of(folder: Path) -> tuple[str, ...]:
    """Name the pickled weight files of a folder: those of the index, else the conventional one; empty if none."""
    index = folder / INDEX_NAME
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise MalformedCheckpointError(f"{index}: weight_map is not a map from tensor names to file names")
        return tuple(sorted(set(weight_map.values())))
    return (SINGLE_NAME,) if (folder / SINGLE_NAME).is_file() else ()


def converted(folder: Path, files: Sequence[str]) -> Path:
    """Give the safetensors folder made from these files of a folder, from the cache when it was made before.

    Raises:
        MalformedCheckpointError: A file is damaged, or not a state dict.
        UnsafeFileError: A pickle that would run code, or a name or link that leads out of the folder.
        DiskSpaceError: The cache's file system is full.
    """
    paths = [contained_path(folder, file) for file in files]
    companions = companions_of(folder)
    key = hashlib.sha256("".join(map(cached_sha256, (*paths, *companions))).encode()).hexdigest()

    def make(partial: Path) -> None:
        for path in companions:
            shutil.copyfile(path, partial / path.name)
        _convert(paths, partial, read_json(folder / "config.json") if (folder / "config.json").is_file() else {})

    return made_once(f"{folder.resolve().name}-{key[:32]}", make)


def _convert(paths: Sequence[Path], target: Path, config: Mapping[str, object]) -> None:
    state_dicts = [_read(path) for path in paths]
    shared = _tied_copies({name: tensor for tensors in state_dicts for name, tensor in tensors.items()}, config)
    weight_map: dict[str, str] = {}
    for k, tensors in enumerate(state_dicts):
        kept = {name: tensor for name, tensor in tensors.items() if name not in shared}
        twice = sorted(kept.keys() & weight_map.keys())
        if twice:
            raise MalformedCheckpointError(f"{paths[k]}: {twice[0]} is in another file too")
        file = "model.safetensors" if len(paths) == 1 else f"model-{k + 1:05d}-of-{len(paths):05d}.safetensors"
        _write(target / file, kept)
        weight_map |= dict.fromkeys(kept, file)
    if len(paths) > 1:
        write_index(target, weight_map)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return read_state_dict(path)
    except NotTorchFileError as error:
        raise MalformedCheckpointError(error.message, hint=error.hint) from error


def _tied_copies(tensors: Mapping[str, Tensor], config: Mapping[str, object]) -> set[str]:
    """Name the tensors that are only another name for one that is kept."""
    specs = _specs(tensors)
    ties = ties_of(NameIndex(specs, config), specs, config)
    return {
        tie.member
        for tie in ties
        if tie.is_stored and tensors[tie.member].data_ptr() == tensors[tie.source].data_ptr() != 0
    }


def _specs(tensors: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    specs, start = {}, 0
    for name, tensor in tensors.items():
        try:
            dtype = DType.from_long_name(str(tensor.dtype))
        except KeyError as error:
            raise MalformedCheckpointError(f"{name}: {tensor.dtype} has no safetensors form") from error
        stop = start + tensor.numel() * dtype.n_bytes
        shape = tuple(tensor.shape)
        specs[name] = TensorSpec(name=name, dtype=dtype, shape=shape, file="", start=start, stop=stop)
        start = stop
    return specs


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    header = format_header(_specs(tensors).values(), {"format": "pt"})
    write_file(path, header, _chunks(tensors.values()), root=path.parent)


def _chunks(tensors: Iterable[Tensor]) -> Iterable[memoryview]:
    for tensor in tensors:
        if tensor.numel():
            yield tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
