"""A base or merged checkpoint: a folder of safetensors files, their headers read and checked, bytes mapped on demand.

Promise: opening reads headers only; every tensor is found through the index where there is one, and the index is
checked against the headers; no file outside the root is opened, except through the links that a hub cache itself makes.
A diffusion pipeline is one checkpoint, made of those of its components: its tensors are ``<component>/<tensor>``.
It does not convert: other layouts are brought here by ``bases``.
"""

from __future__ import annotations

import json
import mmap
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from lora_deploy.errors import Finding, MalformedCheckpointError, RecipeError, UnsafeFileError
from lora_deploy.pipeline_layout import (
    MODEL_INDEX,
    SEPARATOR,
    ComponentWeights,
    listed_components,
    own_code_error,
    weights_of,
)
from lora_deploy.safetensors_file import NotSafetensorsError, read_header
from lora_deploy.tensors import TensorSpec

_INDEX_NAME = "model.safetensors.index.json"
_INDEX_SUFFIX = ".safetensors.index.json"
_SINGLE_NAMES = ("model.safetensors", "diffusion_pytorch_model.safetensors")
_SHARD = re.compile(r"^(?P<stem>.+)-(?P<k>\d{5})-of-(?P<n>\d{5})\.safetensors$")
_MAX_JSON_BYTES = 128_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRef:
    """What the checkpoint is called and which version of it this is."""

    name: str
    """Hub id or path, as the user or a record named it."""
    revision: str | None = None
    """Commit of a hub snapshot."""
    pipeline: str | None = None
    """Name of the pipeline that this is a component of."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Checkpoint:
    """Tensors and configuration of one model on disk."""

    root: Path
    ref: CheckpointRef
    config: Mapping[str, Any]
    """``config.json``, empty when there is none; of a pipeline ``model_index.json`` with the components' own in it."""
    tensors: Mapping[str, TensorSpec]
    """By name, in the order of files and of bytes within them."""
    data_starts: Mapping[str, int]
    """Byte at which each file's data section begins."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Metadata of the first file's header."""
    findings: tuple[Finding, ...] = ()
    """What was noticed when it was opened."""
    is_out_in: bool = False
    """Whether every matrix is known to be laid out as a linear layer's, (out, in), where no configuration says more."""
    components: Mapping[str, Checkpoint] = field(default_factory=dict)
    """The models of a pipeline, each by itself and under its own names; empty for a single model."""
    _maps: dict[str, mmap.mmap] = field(default_factory=dict, repr=False)

    @property
    def files(self) -> tuple[str, ...]:
        """Weight files, in order, relative to the root."""
        return tuple(self.data_starts)

    @property
    def n_bytes(self) -> int:
        """Size of all tensors."""
        return sum(spec.n_bytes for spec in self.tensors.values())

    def owner_of(self, name: str) -> tuple[Checkpoint, str]:
        """Give the model that a tensor of this name belongs to, and what it is called there."""
        component, _, inner = name.partition(SEPARATOR)
        part = self.components.get(component)
        return (self, name) if part is None else (part, inner)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> memoryview:
        """Map bytes ``start:stop`` of a tensor, counted from its first byte; nothing is copied.

        Raises:
            MalformedCheckpointError: The file is not what it was when the checkpoint was opened.
        """
        spec = self.tensors[name]
        end = spec.n_bytes if stop is None else stop
        first = self.data_starts[spec.file] + spec.start
        return memoryview(self._map(spec.file))[first + start : first + end]

    def fetch(self, name: str, start: int, stop: int) -> None:
        """Have the system begin to read what ``read`` will map; touching it page by page would wait for each."""
        spec = self.tensors[name]
        first = self.data_starts[spec.file] + spec.start
        page = (first + start) // mmap.PAGESIZE * mmap.PAGESIZE
        if stop > start:
            self._map(spec.file).madvise(mmap.MADV_WILLNEED, page, first + stop - page)

    def _map(self, file: str) -> mmap.mmap:
        mapped = self._maps.get(file)
        if mapped is None:
            mapped = self._maps[file] = _map_file(self.root / file, self._n_file_bytes(file))
        return mapped

    def _n_file_bytes(self, file: str) -> int:
        ends = (spec.stop for spec in self.tensors.values() if spec.file == file)
        return self.data_starts[file] + max(ends, default=0)


def _map_file(path: Path, n_bytes: int) -> mmap.mmap:
    """Map a file; one that became shorter would end the process at the first touch of a missing page."""
    try:
        with path.open("rb") as stream:
            found = os.fstat(stream.fileno()).st_size
            if found < n_bytes:
                raise MalformedCheckpointError(f"{path}: changed while in use: found {found} bytes, expected {n_bytes}")
            # ACCESS_COPY: tensor libraries want a writable buffer; nobody writes, so no page is ever copied.
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        raise MalformedCheckpointError(f"{path}: cannot be mapped: {error}") from error


def open_checkpoint(
    root: Path,
    *,
    ref: CheckpointRef | None = None,
    files: tuple[str, ...] | None = None,
    variant: str | None = None,
) -> Checkpoint:
    """Open a folder of safetensors files, or of a diffusion pipeline.

    ``files`` limits it to some weight files (a lone file beside others); by default the index decides, else the one
    conventional file, else a complete set of numbered shards, else the only ``*.safetensors`` file. ``variant`` is
    which weights of a pipeline's components are opened where there are several, such as ``fp16``.

    Raises:
        MalformedCheckpointError: No weights, or index, headers and files contradict each other.
        UnsafeFileError: A name or link leads out of the root, or a pipeline brings code of its own.
        RecipeError: A pipeline does not have the variant, or has several and none is named; or this is no pipeline.
    """
    ref = ref or CheckpointRef(name=str(root))
    if files is None and (root / MODEL_INDEX).is_file():
        return _open_pipeline(root, ref, variant)
    if variant is not None:
        raise RecipeError(f"{root}: --variant {variant} is for diffusion pipelines", hint="name the file instead")
    if files is not None:
        return _open_model(root, ref, files, None)
    return _open_model(root, ref, *_weight_files(root))


def _open_model(
    root: Path, ref: CheckpointRef, files: tuple[str, ...], weight_map: dict[str, str] | None
) -> Checkpoint:
    tensors: dict[str, TensorSpec] = {}
    data_starts: dict[str, int] = {}
    metadata: Mapping[str, str] = {}
    for file in files:
        path = contained_path(root, file)
        try:
            header = read_header(path, file=file)
        except NotSafetensorsError as error:
            raise MalformedCheckpointError(error.message, hint=error.hint) from error
        data_starts[file] = header.start
        metadata = metadata or header.metadata
        _add_tensors(root, tensors, header.tensors, weight_map)
    if weight_map is not None:
        _check_index(root, weight_map, tensors)
    return Checkpoint(
        root=root,
        ref=ref,
        config=read_json(contained_path(root, "config.json")) if (root / "config.json").exists() else {},
        tensors=tensors,
        data_starts=data_starts,
        metadata=metadata,
    )


def _open_pipeline(root: Path, ref: CheckpointRef, variant: str | None) -> Checkpoint:
    model_index = read_json(contained_path(root, MODEL_INDEX))
    components: dict[str, Checkpoint] = {}
    n_of_variant = 0
    for name, class_name in listed_components(root, model_index).items():
        chosen = weights_of(root / name, class_name, variant)
        if chosen is None:
            continue
        n_of_variant += chosen.variant == variant
        files, weight_map = _indexed(root / name, chosen)
        inner = CheckpointRef(name=f"{ref.name}{SEPARATOR}{name}", revision=ref.revision, pipeline=ref.name)
        components[name] = _open_model(root / name, inner, files, weight_map)
        if "auto_map" in components[name].config:
            raise own_code_error(root, f"{name}/config.json has an auto_map")
    if not components:
        raise MalformedCheckpointError(f"{root}: none of the pipeline's components has weights")
    if variant is not None and not n_of_variant:
        raise RecipeError(f"{root}: no component has the variant {variant!r}", hint="leave --variant out")
    return Checkpoint(
        root=root,
        ref=ref,
        config={**model_index, **{name: part.config for name, part in components.items()}},
        tensors={
            spec.name: spec
            for name, part in components.items()
            for spec in (_inside(name, inner) for inner in part.tensors.values())
        },
        data_starts={
            f"{name}{SEPARATOR}{file}": start
            for name, part in components.items()
            for file, start in part.data_starts.items()
        },
        components=components,
    )


def _inside(component: str, spec: TensorSpec) -> TensorSpec:
    return replace(spec, name=f"{component}{SEPARATOR}{spec.name}", file=f"{component}{SEPARATOR}{spec.file}")


def contained_path(root: Path, name: str) -> Path:
    """Resolve a file named by a checkpoint.

    Raises:
        UnsafeFileError: The name is absolute, climbs, or is a link out of the root (a hub cache's blobs are allowed).
        MalformedCheckpointError: There is no such file.
    """
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name:
        raise UnsafeFileError(f"{root}: file name {name!r} leads out of the folder")
    path = root / name
    if not path.is_file():
        raise MalformedCheckpointError(f"{path}: no such file", hint="the download may be incomplete; fetch it again")
    real = path.resolve()
    if not any(real.is_relative_to(allowed) for allowed in _allowed_roots(root)):
        raise UnsafeFileError(f"{path}: is a link to {real}, outside the folder", hint="copy the file into the folder")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of reasonable size.

    Raises:
        MalformedCheckpointError: Too large, not JSON, or not an object.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise MalformedCheckpointError(f"{path}: {path.stat().st_size} bytes, at most {_MAX_JSON_BYTES} are read")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise MalformedCheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise MalformedCheckpointError(f"{path}: is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise MalformedCheckpointError(f"{path}: found a JSON {type(value).__name__}, expected an object")
    return value


def _allowed_roots(root: Path) -> tuple[Path, ...]:
    real = root.resolve()
    for folder in (real, *real.parents):  # a snapshot, or a folder within one
        if folder.parent.name == "snapshots":
            return real, folder.parent.parent / "blobs"
    return (real,)


def has_weights(root: Path) -> bool:
    """Whether a folder holds safetensors weights, an index of them, or a pipeline."""
    return any(root.glob("*.safetensors")) or any(root.glob(f"*{_INDEX_SUFFIX}")) or (root / MODEL_INDEX).is_file()


def _weight_files(root: Path) -> tuple[tuple[str, ...], dict[str, str] | None]:
    if not root.is_dir():
        raise MalformedCheckpointError(f"{root}: no such folder")
    indices = sorted(path.name for path in root.glob(f"*{_INDEX_SUFFIX}"))
    index = _INDEX_NAME if _INDEX_NAME in indices else indices[0] if len(indices) == 1 else None
    if index is not None:
        return _by_index(root, index)
    for name in _SINGLE_NAMES:
        if (root / name).is_file():
            return (name,), None
    return _without_index(root), None


def _by_index(root: Path, index: str) -> tuple[tuple[str, ...], dict[str, str]]:
    weight_map = read_json(contained_path(root, index)).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise MalformedCheckpointError(f"{root / index}: weight_map is not a map from tensor names to file names")
    return tuple(sorted(set(weight_map.values()))), weight_map


def _indexed(folder: Path, weights: ComponentWeights) -> tuple[tuple[str, ...], dict[str, str] | None]:
    """Give a component's files as its index names them."""
    if weights.index is None:
        return weights.files, None
    files, weight_map = _by_index(folder, weights.index)
    other = sorted(set(files) - set(weights.files))
    if other:
        raise MalformedCheckpointError(f"{folder}: {weights.index} names {other[0]}, which is not there")
    return files, weight_map


def _without_index(root: Path) -> tuple[str, ...]:
    found = sorted(path.name for path in root.glob("*.safetensors"))
    if len(found) == 1 and not _SHARD.match(found[0]):
        return (found[0],)
    shards = [match for name in found if (match := _SHARD.match(name))]
    if shards and len(shards) == len(found) and len({(match["stem"], match["n"]) for match in shards}) == 1:
        missing = sorted(set(range(1, int(shards[0]["n"]) + 1)) - {int(match["k"]) for match in shards})
        if not missing:
            return tuple(found)
        problem = (
            f"shards {', '.join(map(str, missing[:5]))} of {int(shards[0]['n'])} are missing, and there is no index"
        )
    else:
        problem = f"{len(found)} safetensors files and no index" if found else "no safetensors weights"
    raise MalformedCheckpointError(f"{root}: {problem}", hint=f"expected model.safetensors or {_INDEX_NAME}")


def _add_tensors(
    root: Path, tensors: dict[str, TensorSpec], found: Mapping[str, TensorSpec], weight_map: dict[str, str] | None
) -> None:
    for name, spec in found.items():
        if weight_map is not None and weight_map.get(name, spec.file) != spec.file:
            continue  # a copy in a file that the index does not point at (tied tensors saved twice)
        if name in tensors:
            raise MalformedCheckpointError(f"{root}: {name} is in both {tensors[name].file} and {spec.file}")
        tensors[name] = spec


def _check_index(root: Path, weight_map: dict[str, str], tensors: Mapping[str, TensorSpec]) -> None:
    missing = [name for name in weight_map if name not in tensors]
    if missing:
        raise MalformedCheckpointError(
            f"{root}: the index names {len(missing)} tensors that its files do not hold, "
            f"first {missing[0]} in {weight_map[missing[0]]}",
            hint="index and weight files are from different versions; fetch both again",
        )
