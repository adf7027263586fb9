"""A quantised base, unpacked once into a folder of plain weights, tensor by tensor and block by block.

Merging changes weights, and packed ones have no room for the change; so they are unpacked, and only where the caller
said so (``--dequantize``). Promise: each value is the real number that the packing stands for, rounded once to the
format that the base computes in (which its packing or its configuration names); that is the weight which the forward
pass of training multiplied with. Tensors that are not packed are copied byte for byte; the configuration loses its
quantisation, and nothing else. Memory does not grow with the model.

It will not quantise the merged model again.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_deploy.artifact import cached_sha256
from lora_deploy.bases.cache import check_room, companions_of, made_once, write_index
from lora_deploy.bases.quantisations import QUANTISATIONS, quantisation_named
from lora_deploy.bases.quantisations.interface import PackedTensor, Unpacking
from lora_deploy.bases.quantised import (
    SETTINGS_FILES,
    dequantised_finding,
    plain_config,
    quantisation_of,
    quantised_error,
    settings_of,
)
from lora_deploy.checkpoint import Checkpoint, open_checkpoint
from lora_deploy.errors import Finding, MalformedCheckpointError
from lora_deploy.rounding import round_once
from lora_deploy.safetensors_file import format_header, write_file
from lora_deploy.tensors import DType, TensorSpec

_FORMULAS = 1
"""Counted up when a formula changes: what older ones made is not found again."""
_BLOCK_ELEMENTS = 1 << 18
_MAX_SHARD_BYTES = 5_000_000_000
_COPIED_BYTES = 1 << 24


def dequantised(checkpoint: Checkpoint) -> Checkpoint:
    """Give the plain form of a quantised base, from the cache when it was made before.

    Raises:
        InputError: The quantisation, or this variant of it, is not known.
        MalformedCheckpointError: Packed tensors contradict each other, or hold what is no finite number.
        DiskSpaceError: The cache's file system is full.
    """
    method = quantisation_of(checkpoint)
    entry = quantisation_named(method) if method else None
    if method is None or entry is None:
        known = ", ".join(quantisation.name for quantisation in QUANTISATIONS)
        raise quantised_error(checkpoint, str(method), f"cannot be dequantised: known are {known}")
    unpacking: Unpacking = entry.load()(checkpoint, settings_of(checkpoint))
    packed = {tensor.name: tensor for tensor in unpacking.tensors}
    shards = _shards(_plain_specs(checkpoint, unpacking, packed))
    _check_nothing_is_left(checkpoint, shards, method)
    companions = [path for path in companions_of(checkpoint.root) if path.name not in SETTINGS_FILES]
    files = [checkpoint.root / file for file in checkpoint.files]
    made_of = json.dumps([_FORMULAS, *map(cached_sha256, (*files, *companions))])

    def make(folder: Path) -> None:
        n_bytes = sum(spec.n_bytes for shard in shards for spec in shard)
        check_room(folder, n_bytes + sum(path.stat().st_size for path in companions))
        _write(checkpoint, shards, packed, folder)
        for path in companions:
            (folder / path.name).write_bytes(_companion(path))

    name = f"{checkpoint.root.resolve().name}-{hashlib.sha256(made_of.encode()).hexdigest()[:32]}"
    plain = open_checkpoint(made_once(name, make), ref=checkpoint.ref)
    return replace(plain, findings=(*plain.findings, _note(checkpoint, unpacking, entry.name)))


def _plain_specs(
    checkpoint: Checkpoint, unpacking: Unpacking, packed: Mapping[str, PackedTensor]
) -> Iterator[TensorSpec]:
    """List the tensors of the plain model in the base's order; their places in files come later."""
    owner = {key: tensor for tensor in unpacking.tensors for key in tensor.keys}
    if len(owner) != sum(len(tensor.keys) for tensor in unpacking.tensors) or len(packed) != len(unpacking.tensors):
        raise MalformedCheckpointError(f"{checkpoint.ref.name}: a stored tensor belongs to two packed ones")
    taken = Counter(name for name in checkpoint.tensors if name in packed and name not in owner)
    if taken:
        raise MalformedCheckpointError(f"{checkpoint.ref.name}: has both {min(taken)} and its packed form")
    fallback = _base_dtype(checkpoint, owner.keys() | set(unpacking.left_out))
    written: set[str] = set()
    for name, spec in checkpoint.tensors.items():
        tensor = owner.get(name)
        if tensor is None:
            if name not in unpacking.left_out:
                yield spec
        elif tensor.name not in written:
            written.add(tensor.name)
            yield TensorSpec(
                name=tensor.name, dtype=tensor.dtype or fallback, shape=tensor.shape, file="", start=0, stop=0
            )


def _base_dtype(checkpoint: Checkpoint, used: set[str]) -> DType:
    """Find the format that the base computes in: declared, else that of most of its plain tensors."""
    for config in (checkpoint.config, checkpoint.config.get("text_config")):
        if isinstance(config, Mapping):
            declared = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
            if found := next((dtype for dtype in DType if dtype.is_floating and dtype.long_name == declared), None):
                return found
    plain = Counter(s.dtype for name, s in checkpoint.tensors.items() if s.dtype.is_floating and name not in used)
    return plain.most_common(1)[0][0] if plain else DType.BF16


def _shards(specs: Iterator[TensorSpec]) -> list[list[TensorSpec]]:
    """Give every tensor its place in a file of bounded size."""
    shards: list[list[TensorSpec]] = [[]]
    end = 0
    for spec in specs:
        n_bytes = spec.n_elements * spec.dtype.n_bytes
        if shards[-1] and end + n_bytes > _MAX_SHARD_BYTES:
            shards.append([])
            end = 0
        shards[-1].append(replace(spec, start=end, stop=end + n_bytes))
        end += n_bytes
    names = [f"model-{k + 1:05d}-of-{len(shards):05d}.safetensors" for k in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    return [[replace(spec, file=file) for spec in shard] for file, shard in zip(names, shards, strict=True)]


def _check_nothing_is_left(checkpoint: Checkpoint, shards: Sequence[Sequence[TensorSpec]], method: str) -> None:
    """What still looks packed was packed by something that the quantisation does not know."""
    tensors = {spec.name: spec for shard in shards for spec in shard}
    rest = quantisation_of(replace(checkpoint, tensors=tensors, config=plain_config(checkpoint.config)))
    if rest is not None:
        raise quantised_error(checkpoint, f"{method}, and beside it {rest}", "only one of the two can be dequantised")


def _write(
    checkpoint: Checkpoint, shards: Sequence[Sequence[TensorSpec]], packed: Mapping[str, PackedTensor], folder: Path
) -> None:
    for shard in shards:
        header = format_header(shard, {"format": "pt"})
        if shard:
            write_file(folder / shard[0].file, header, _bytes_of(checkpoint, shard, packed), root=folder)
    if len(shards) > 1:
        write_index(folder, {spec.name: spec.file for shard in shards for spec in shard})


def _bytes_of(
    checkpoint: Checkpoint, shard: Sequence[TensorSpec], packed: Mapping[str, PackedTensor]
) -> Iterator[memoryview]:
    for spec in shard:
        tensor = packed.get(spec.name)
        if tensor is not None:
            yield from _unpacked(checkpoint, tensor, spec.dtype)
        else:
            for start in range(0, spec.n_bytes, _COPIED_BYTES):
                yield checkpoint.read(spec.name, start, min(start + _COPIED_BYTES, spec.n_bytes))


def _unpacked(checkpoint: Checkpoint, tensor: PackedTensor, dtype: DType) -> Iterator[memoryview]:
    rows = tensor.prepare()
    n_at_once = max(1, _BLOCK_ELEMENTS // max(tensor.shape[-1], 1))
    for start in range(0, tensor.n_rows, n_at_once):
        rounded = round_once(rows(start, min(start + n_at_once, tensor.n_rows)).contiguous(), dtype)
        if not rounded.isfinite().all():
            raise MalformedCheckpointError(
                f"{checkpoint.ref.name}: {tensor.name}: holds what is no finite {dtype.long_name}"
            )
        if rounded.numel():
            yield _buffer(rounded)


def _buffer(values: Tensor) -> memoryview:
    buffer: memoryview = values.reshape(-1).view(torch.uint8).numpy().data
    return buffer


def _companion(path: Path) -> bytes:
    content = path.read_bytes()
    if path.name != "config.json":
        return content
    config: dict[str, Any] = json.loads(content)
    return (json.dumps(plain_config(config), indent=2) + "\n").encode()


def _note(checkpoint: Checkpoint, unpacking: Unpacking, method: str) -> Finding:
    left_out = f"; left out: {', '.join(unpacking.left_out[:3])} …" if unpacking.left_out else ""
    return dequantised_finding(checkpoint.ref, f"{len(unpacking.tensors)} tensors were packed ({method})", left_out)
