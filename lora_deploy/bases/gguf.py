"""A GGUF file as a base: unpacked once into a safetensors folder with its tokenizer, then like any other folder.

Merging changes weights, and a quantised block has no room for the change; so a GGUF base is unpacked, and only where
the caller said so (``dequantize=True``, on the command line ``--dequantize``), because the merged model then is not the
size of the file that was given.

Promise: no value changes here. The loader computes every weight in float32 (a Q4_1 weight is scale·q + minimum of two
float16 numbers, which needs up to 15 bits and more where the exponents differ, so no 16-bit format holds it); the
folder is stored in the narrowest of float16, bfloat16 and float32 that holds *all* its values exactly: float32 for
quantised files, 16 bits for files that were 16-bit. The folder appears whole or not at all, and none of its weights is
a fresh random one: what the file lacks is an error.

The work happens in a process of its own: its memory, which grows with the model (about twice its float32 size), is
measured alone and given back before the merge, whose memory is bounded.

It will not convert back, ask the network, or run code that the file brings.

Law: every stored value equals the reference dequantisation of the ``gguf`` package.
Source: transformers 5.23, ``quantizers/quantizer_gguf.py``. Loaded with ``GgufConfig(dequantize=True)`` the model is a
plain one; without it, it keeps a quantizer that refuses ``save_pretrained`` although the weights are unpacked.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_deploy import errors
from lora_deploy.artifact import cache_root, cached_sha256
from lora_deploy.bases.cache import check_room, only_one_at, partial_folder, sweep
from lora_deploy.errors import (
    InputError,
    LoraDeployError,
    MalformedCheckpointError,
    OutputExistsError,
    RecipeError,
)
from lora_deploy.safetensors_file import sync_folder, writing_error

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

MAGIC = b"GGUF"
_NEEDED_PACKAGES = ("transformers", "accelerate", "gguf")
_VERSIONED_PACKAGES = ("lora-deploy", "torch", *_NEEDED_PACKAGES)
_INSTALL_HINT = "pip install 'lora-deploy[demo]'"
_TOKENIZER_BYTES = 64_000_000
"""Room kept for what lies beside the weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportedBase:
    """A safetensors folder made from a GGUF file."""

    folder: Path
    peak_bytes: int | None
    """Peak resident memory of the process that made it; None when the folder was found in the cache."""


def import_gguf(path: Path, destination: Path, *, dequantize: bool = False) -> ImportedBase:
    """Unpack a GGUF file into a new folder; the work happens in ``<destination>.*.partial``, renamed at the end.

    Raises:
        RecipeError: ``dequantize`` is False.
        MalformedCheckpointError: The file is not a GGUF file.
        InputError: A package is missing, or the loader cannot read the file or does not know its architecture.
        OutputExistsError: ``destination`` exists.
        DiskSpaceError: The folder would not fit.
    """
    if not dequantize:
        raise RecipeError(
            f"base {path}: is a GGUF file; its weights must be unpacked before anything can be merged into them",
            hint="--dequantize",
        )
    _check_magic(path)
    _check_packages()
    if destination.exists():
        raise OutputExistsError(f"{destination}: exists already", hint="remove it or choose another folder")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with partial_folder(destination) as partial:
            peak_bytes = _convert_in_own_process(path, partial)
            partial.rename(destination)
        sync_folder(destination.parent)
    except OSError as error:
        raise writing_error(destination, error) from error
    return ImportedBase(folder=destination, peak_bytes=peak_bytes)


def cached_gguf(path: Path, *, dequantize: bool = False) -> ImportedBase:
    """Unpack a GGUF file under the cache folder, or find what was unpacked before.

    The folder's name is made from the file's sha256 and the versions of all packages that compute the weights.
    Commands that run at the same time wait for each other.

    Raises:
        LoraDeployError: As ``import_gguf``; the cache is not consulted without ``dequantize`` either.
    """
    if not dequantize:
        return import_gguf(path, path, dequantize=False)
    _check_magic(path)
    _check_packages()
    folder = cache_root() / "bases" / f"{path.stem}-{_cache_key(path)}"
    with only_one_at(folder):
        if folder.is_dir():
            return ImportedBase(folder=folder, peak_bytes=None)
        sweep(folder)
        return import_gguf(path, folder, dequantize=True)


def _check_magic(path: Path) -> None:
    try:
        with path.open("rb") as stream:
            start = stream.read(24)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    if start.startswith(b"version "):
        raise MalformedCheckpointError(
            f"{path}: is a git LFS pointer, not the weights", hint="fetch the real file: git lfs pull"
        )
    if not start.startswith(MAGIC):
        raise MalformedCheckpointError(f"{path}: not a GGUF file: found first bytes {start[:4]!r}, expected {MAGIC!r}")
    if len(start) < 24:
        raise MalformedCheckpointError(f"{path}: truncated: found {len(start)} bytes, the GGUF header alone has 24")


def _check_packages() -> None:
    missing = [name for name in _NEEDED_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"reading a GGUF base needs {', '.join(missing)}: not installed", hint=_INSTALL_HINT)


def _cache_key(path: Path) -> str:
    versions = {}
    for name in _VERSIONED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    made_of = {"sha256": cached_sha256(path), "versions": versions}
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:24]


def _convert_in_own_process(path: Path, partial: Path) -> int:
    """Run ``_child`` in a fresh interpreter; return its peak resident memory in bytes."""
    package_parent = str(Path(errors.__file__).parents[1])
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (package_parent, os.environ.get("PYTHONPATH")))),
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
    }
    program = "from lora_deploy.bases.gguf import _child; _child()"
    # -P: the current folder may hold files named like modules.
    command = [sys.executable, "-P", "-c", program, str(path.resolve()), str(partial.resolve())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603 - our own interpreter
    try:
        outcome = json.loads(done.stdout)
    except ValueError as error:
        last_line = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(
            f"{path}: unpacking stopped with exit status {done.returncode}: {last_line}",
            hint="exit status -9 usually means that memory ran out",
        ) from error
    if "error" in outcome:
        raise getattr(errors, outcome["error"])(outcome["message"], hint=outcome["hint"])
    return int(outcome["peak_bytes"])


def _child() -> None:
    """Unpack ``argv[1]`` into the folder ``argv[2]``; print one JSON document with the outcome."""
    source, folder = Path(sys.argv[1]), Path(sys.argv[2])
    outcome: dict[str, Any]
    with contextlib.redirect_stdout(sys.stderr):
        try:
            _unpack(source, folder)
            outcome = {"peak_bytes": _peak_resident_bytes()}
        except LoraDeployError as error:
            outcome = {"error": type(error).__name__, "message": error.message, "hint": error.hint}
    print(json.dumps(outcome))  # noqa: T201 - the parent reads it


def _unpack(source: Path, folder: Path) -> None:
    import torch

    # Alone in a folder: transformers would also read configs, adapters and templates that lie beside the file.
    with tempfile.TemporaryDirectory() as alone:
        (Path(alone) / "model.gguf").symlink_to(source)
        try:
            model, tokenizer = _load(Path(alone))
        except LoraDeployError:
            raise
        except Exception as error:
            one_line = " ".join(str(error).split())
            raise InputError(f"{source}: cannot be unpacked: {type(error).__name__}: {one_line}") from error
    tensors = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
    torch.nn.Module.to(model, narrowest_exact_dtype(tensors))
    check_room(folder, sum(parameter.nbytes for parameter in model.parameters()) + _TOKENIZER_BYTES)
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _flush_to_disk(folder)
    except OSError as error:
        raise writing_error(folder, error) from error


def _load(folder: Path) -> tuple[PreTrainedModel, Any]:
    import torch
    import transformers

    where: dict[str, Any] = {"pretrained_model_name_or_path": str(folder), "gguf_file": "model.gguf"}
    try:
        plain = transformers.GgufConfig(dequantize=True)
    except AttributeError as error:
        raise InputError(f"transformers {transformers.__version__} is too old", hint=_INSTALL_HINT) from error
    config = transformers.AutoConfig.from_pretrained(**where)
    model, loaded = _model_class(type(config)).from_pretrained(
        **where, config=config, dtype=torch.float32, quantization_config=plain, output_loading_info=True
    )
    absent = sorted(loaded["missing_keys"]) + sorted(str(key) for key in loaded["mismatched_keys"])
    if absent:
        raise InputError(
            f"{len(absent)} weights of {type(model).__name__} are not in the file: {', '.join(absent[:3])}"
        )
    return model, transformers.AutoTokenizer.from_pretrained(**where)


def _model_class(config_class: type) -> Any:  # noqa: ANN401 - the auto classes share no type
    import transformers

    if config_class in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForCausalLM
    if config_class in transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForSeq2SeqLM
    return transformers.AutoModel


def narrowest_exact_dtype(tensors: Iterable[torch.Tensor]) -> torch.dtype:
    """Choose the first of float16, bfloat16 and float32 that holds every value exactly.

    Shapes: any; dtype float32. A NaN equals nothing, so it keeps everything in float32.
    """
    import torch

    tensors = list(tensors)
    for dtype in (torch.float16, torch.bfloat16):
        if all(torch.equal(tensor.to(dtype).to(tensor.dtype), tensor) for tensor in tensors):
            return dtype
    return torch.float32


def _flush_to_disk(folder: Path) -> None:
    """Make the files survive a power cut before the rename says that they are whole."""
    for path in folder.iterdir():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())


def _peak_resident_bytes() -> int:
    """Peak resident memory of this process; getrusage would count the parent's where it was forked."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
