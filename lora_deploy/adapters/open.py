"""Find an adapter's weights and configuration, open them, and let the one reader that knows the format read them.

Promise: no file outside the given folder is opened, except through the links that a hub cache itself makes; an
``adapter_config.json`` beside the weights is always read; a file of a format that is known but not readable here is
refused by that format's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_deploy.adapter import Adapter
from lora_deploy.adapters import READERS
from lora_deploy.adapters.interface import STATE_DICTS, AdapterFile, AdapterReader, ReadOptions
from lora_deploy.adapters.tensor_file import PICKLE_SUFFIXES, SAFETENSORS_SUFFIX, read_tensors
from lora_deploy.adapters.torchtune_signs import OWN_NAME
from lora_deploy.adapters.unsupported import refuse_format
from lora_deploy.artifact import cached_sha256
from lora_deploy.checkpoint import contained_path, read_json
from lora_deploy.errors import (
    AmbiguousAdapterFormatError,
    InputError,
    MalformedAdapterError,
    MalformedCheckpointError,
    UnknownAdapterFormatError,
    UnsafeFileError,
)
from lora_deploy.safetensors_file import find_stand_in

CONFIG_NAME = "adapter_config.json"
_WEIGHT_NAMES = ("adapter_model.safetensors", "adapter_model.bin")
_OTHER_WEIGHT_NAMES = ("adapters.safetensors", "adapters.npz", "lit_model.pth.lora")
"""What other trainers call them, beside checkpoints of the same run under other names: mlx-lm, litgpt."""
_OTHER_SUFFIXES = frozenset({".npz", ".gguf", ".onnx_adapter"})
_TRAINER_FILES = frozenset({"training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt"})
"""What a trainer leaves beside the weights under the same suffixes."""


def read_adapter(path: Path, options: ReadOptions | None = None) -> Adapter:
    """Read the adapter at a folder or file.

    Raises:
        InputError: Nothing there, not what it claims to be, of an unknown or unsupported format, or not mergeable.
        RecipeError: An option asks for what the file does not hold.
    """
    options = options or ReadOptions()
    if options.adapter_name and (path / options.adapter_name / CONFIG_NAME).is_file():
        path, options = path / options.adapter_name, replace(options, adapter_name=None)
    file = open_adapter(path)
    refuse_format(file)
    readers: list[AdapterReader] = [entry.load() for entry in READERS]
    readers = [reader for reader in readers if file.container in getattr(reader, "containers", STATE_DICTS)]
    found = [reader for reader in readers if reader.recognises(file)]
    if len(found) > 1:
        raise AmbiguousAdapterFormatError(
            f"{file.path}: readable as {' and as '.join(reader.format for reader in found)}",
            hint=f"keep the tensors of one format, or put an {CONFIG_NAME} beside the file",
        )
    if not found:
        known = "; ".join(f"{entry.name}: {entry.summary}" for entry in READERS)
        raise UnknownAdapterFormatError(
            f"{file.path}: no known format has tensors such as {next(iter(file.tensors))!r}",
            hint=f"known formats are {known}",
        )
    return found[0].read(file, options)


def open_adapter(path: Path) -> AdapterFile:
    """Open a weights file, or the one weights file of a folder, with the configuration beside it.

    Raises:
        InputError: No such file, damaged, a link out of the folder, or a package that reads it is missing.
    """
    if path.is_dir():
        weights = _weights_in(path)
        name = _name_of_folder(path)
    elif path.is_file():
        weights = path
        name = _name_of_folder(path.parent) if path.name in _WEIGHT_NAMES else path.name.removesuffix(path.suffix)
    else:
        raise InputError(f"adapter {path}: no such file or folder", code="no-adapter")
    if weights.name == CONFIG_NAME:
        raise MalformedAdapterError(f"{weights}: is a configuration, not weights", hint="name the folder instead")
    config_path = weights.parent / CONFIG_NAME
    config = read_config(config_path) if config_path.exists() or config_path.is_symlink() else None
    container, tensors, metadata = read_tensors(weights)
    return AdapterFile(
        path=weights,
        name=name,
        tensors=tensors,
        metadata=metadata,
        config=config,
        config_path=config_path if config is not None else None,
        sha256=cached_sha256(weights),
        container=container,
    )


def read_config(path: Path) -> Mapping[str, Any]:
    """Read an adapter's JSON configuration.

    Raises:
        MalformedAdapterError: Not there, a stand-in for the real file, or not a JSON object.
        UnsafeFileError: A link out of its folder.
    """
    try:
        contained = contained_path(path.parent, path.name)
        with contained.open("rb") as stream:
            stand_in = find_stand_in(stream.read(64))
        if stand_in:
            raise MalformedAdapterError(f"{path}: {stand_in[0]}", hint=stand_in[1])
        return read_json(contained)
    except MalformedCheckpointError as error:
        raise MalformedAdapterError(error.message, hint=error.hint) from error
    except OSError as error:
        raise MalformedAdapterError(f"{path}: cannot be read: {error.strerror or error}") from error


def _weights_in(folder: Path) -> Path:
    for name in (OWN_NAME, *_WEIGHT_NAMES, *_OTHER_WEIGHT_NAMES):
        if (folder / name).exists() or (folder / name).is_symlink():
            return _contained(folder, name)
    suffixes = {SAFETENSORS_SUFFIX, *PICKLE_SUFFIXES, *_OTHER_SUFFIXES}
    found = sorted(
        entry.name
        for entry in folder.iterdir()
        if entry.suffix in suffixes and entry.name not in _TRAINER_FILES and not entry.name.startswith("rng_state")
    )
    if len(found) == 1:
        return _contained(folder, found[0])
    if found:
        raise AmbiguousAdapterFormatError(
            f"{folder}: {len(found)} weight files and none of them is {' or '.join(_WEIGHT_NAMES)}: "
            + ", ".join(found[:8]),
            hint="name the file instead of the folder",
        )
    inside = sorted(entry.parent.name for entry in folder.glob(f"*/{CONFIG_NAME}"))
    raise MalformedAdapterError(
        f"{folder}: no weights, expected {' or '.join(_WEIGHT_NAMES)}",
        hint=f"adapters lie in {', '.join(inside)}: name one with --adapter-name" if inside else None,
    )


def _contained(folder: Path, name: str) -> Path:
    try:
        return contained_path(folder, name)
    except UnsafeFileError as error:
        raise UnsafeFileError(error.message, hint="copy the file into the folder, or name the file itself") from error
    except MalformedCheckpointError as error:
        raise MalformedAdapterError(error.message, hint=error.hint) from error


def _name_of_folder(folder: Path) -> str:
    """Name a folder; a snapshot of a hub cache is named after its repository."""
    real = folder.absolute()
    for inner, outer in zip((real, *real.parents), real.parents, strict=False):
        if outer.name == "snapshots" and outer.parent.name.startswith("models--"):
            repository = outer.parent.name.split("--")[-1]
            return repository if inner == real else f"{repository}-{real.name}"
    return real.name
