"""Files written by ``torch.save``: unpickled without running anything.

Promise: ``weights_only=True`` or not at all; what comes back is tensors by name and nothing else, mapped where the file
is a zip archive. This is the only code that unpickles.
"""

from __future__ import annotations

import pickle
import pickletools
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_deploy.errors import InputError, UnsafeFileError
from lora_deploy.safetensors_file import find_stand_in

TORCH_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt"})

_WRAPPING_KEYS = ("state_dict", "model")
"""Lightning and litgpt save their tensors one level down."""
_RUNS_CODE = ("Unsupported global", "GLOBAL", "REDUCE", "Unsupported class", "not an allowed", "was blocked")


class NotTorchFileError(InputError):
    """The bytes are no state dict; adapters and checkpoints re-raise it under their own name."""


def read_state_dict(path: Path, *, pairs_of: str | None = None) -> dict[str, Tensor]:
    """Read the tensors of a pickled state dict; those that share storage still do.

    With ``pairs_of``, a list of tensors is read too: as pairs ``<pairs_of>:<i>:up`` and ``:down``.

    Raises:
        NotTorchFileError: Damaged, or not a map from names to tensors.
        UnsafeFileError: A pickle that would run code.
    """
    try:
        with path.open("rb") as stream:
            stand_in = find_stand_in(stream.read(64))
        if stand_in:
            raise NotTorchFileError(f"{path}: {stand_in[0]}", hint=stand_in[1])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # read or refused, whichever protocol
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError as error:
        raise NotTorchFileError(f"{path}: cannot be read: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        raise _unpickling_error(path, error) from error
    except (RuntimeError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise NotTorchFileError(f"{path}: not a readable torch file: {_first_line(error)}") from error
    if pairs_of is not None and isinstance(content, list):
        content = _numbered(path, content, pairs_of)
    return _state_dict(path, content)


def _numbered(path: Path, content: list[Any], name: str) -> dict[str, Any]:
    if len(content) % 2 or not all(isinstance(value, Tensor) for value in content):
        raise NotTorchFileError(f"{path}: a list of {len(content)} entries, expected pairs of tensors: up, down …")
    return {f"{name}:{k // 2}:{('up', 'down')[k % 2]}": value for k, value in enumerate(content)}


def _unpickling_error(path: Path, error: pickle.UnpicklingError) -> NotTorchFileError | UnsafeFileError:
    lines = [line.strip() for line in str(error).splitlines()]
    reasons = [line.removeprefix("WeightsUnpickler error:").strip() for line in lines if _names_code(line)]
    called = reasons[-1].partition(". ")[0] if reasons else _named_global(path)
    if called:
        return UnsafeFileError(
            f"{path}: a pickle that would run code: {called}",
            hint="ask its author for safetensors, or convert it where running its code does no harm",
        )
    return NotTorchFileError(f"{path}: not a readable torch file", hint="download or save the file again")


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
        raise NotTorchFileError(f"{path}: found one bare tensor of shape {tuple(content.shape)}, expected a dict")
    for key in _WRAPPING_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise NotTorchFileError(f"{path}: found a {type(content).__name__}, expected a dict of tensors")
    others = [str(key) for key, value in content.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if others:
        raise NotTorchFileError(
            f"{path}: {len(others)} of {len(content)} entries are not tensors, first {others[0]!r}",
            hint="expected a state dict: a map from names to tensors",
        )
    return {key: value.detach() for key, value in content.items()}
