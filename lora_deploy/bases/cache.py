"""Folders made from bases that are not safetensors folders yet: each made once, below the cache folder.

Promise: a folder appears whole or not at all, under a name made of the digests of what it was made from; commands that
run at the same time wait for each other.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from lora_deploy.artifact import cache_root
from lora_deploy.errors import DiskSpaceError
from lora_deploy.safetensors_file import sync_folder, writing_error

_WEIGHT_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".safetensors", ".h5", ".msgpack", ".onnx", ".gguf"})
_MAX_COMPANION_BYTES = 100_000_000


def made_once(name: str, make: Callable[[Path], None]) -> Path:
    """Give the cached folder of this name; ``make`` fills an empty one that is to become it.

    Raises:
        DiskSpaceError: The cache's file system is full.
        MergeError: The folder cannot be written for another reason.
    """
    target = cache_root() / "bases" / name
    try:
        with only_one_at(target):
            if not target.is_dir():
                sweep(target)
                with partial_folder(target) as partial:
                    make(partial)
                    partial.rename(target)
                sync_folder(target.parent)
    except OSError as error:
        raise writing_error(target, error) from error
    return target


@contextlib.contextmanager
def only_one_at(folder: Path) -> Iterator[None]:
    """Hold a lock beside the folder; the system drops it when the process dies."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        stream = folder.with_name(f"{folder.name}.lock").open("w")
    except OSError as error:
        raise writing_error(folder, error) from error
    with stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def partial_folder(destination: Path) -> Iterator[Path]:
    """Make a folder beside the destination, gone at the end unless renamed.

    Its name is new every time: when a run is killed, its child may still be writing for a moment.
    """
    partial = Path(tempfile.mkdtemp(prefix=f"{destination.name}.", suffix=".partial", dir=destination.parent))
    try:
        partial.chmod(0o755)
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what killed runs left beside a folder; hold its lock."""
    for stale in folder.parent.glob(f"{glob.escape(folder.name)}.*.partial"):
        shutil.rmtree(stale, ignore_errors=True)


def companions_of(folder: Path) -> list[Path]:
    """List the files of a base that travel with its weights: configuration, tokenizer, templates."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and path.suffix not in _WEIGHT_SUFFIXES
        and not path.name.endswith(".index.json")
        and path.stat().st_size <= _MAX_COMPANION_BYTES
    ]


def write_index(folder: Path, weight_map: Mapping[str, str]) -> None:
    """Write the index of a folder's shards: tensor names to file names."""
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))


def check_room(folder: Path, n_bytes: int) -> None:
    """Check, before any write, that a folder's file system has room.

    Raises:
        DiskSpaceError: It has less.
    """
    free = shutil.disk_usage(folder).free
    if n_bytes > free:
        raise DiskSpaceError(
            f"{folder}: found {free} free bytes, the unpacked base needs {n_bytes}",
            hint="free some space or set LORA_DEPLOY_CACHE to a folder elsewhere",
        )
