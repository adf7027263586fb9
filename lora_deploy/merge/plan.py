"""Decide every byte of a merge before the first is written.

Promise: the plan names each output tensor, its dtype, the file and place it goes to, and what happens to it; it states
the bytes to write and the memory to use; nothing later decides anything. The same inputs and options give the same
plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from lora_deploy.adapter import ModuleUpdate
from lora_deploy.adapters.interface import ReadOptions
from lora_deploy.checkpoint import Checkpoint
from lora_deploy.errors import Finding, MergeError, RecipeError, Severity
from lora_deploy.merge.layout import files_of_model, files_of_pipeline, untouched_header
from lora_deploy.merge.options import MergeOptions
from lora_deploy.merge.precision import OVERFLOWS_FLOAT16, is_kept, model_types
from lora_deploy.rounding import dtype_of
from lora_deploy.safetensors_file import format_header
from lora_deploy.tensors import DType, TensorSpec
from lora_deploy.updates.interface import Update
from lora_deploy.updates.replacement import Replacement
from lora_deploy.validate import Binding

_METADATA = {"format": "pt"}


class Treatment(StrEnum):
    """What happens to a tensor on its way into the merged checkpoint."""

    UNTOUCHED = "untouched"
    """Copied as bytes."""
    CAST = "cast"
    """Rounded once to the output dtype."""
    MERGED = "merged"
    """Changed by updates and rounded once."""
    REPLACED = "replaced"
    """The adapter's own values, rounded once."""
    ADDED = "added"
    """Not in the base at all."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlannedTensor:
    """One tensor of the merged checkpoint."""

    spec: TensorSpec
    """Where it goes: name, dtype, shape, file and bytes of the output."""
    source: TensorSpec | None
    """The base tensor it starts from."""
    updates: tuple[ModuleUpdate, ...]
    treatment: Treatment


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ShardPlan:
    """One output file: the unit of work, of resumption and of distribution."""

    file: str
    tensors: tuple[PlannedTensor, ...]
    header: bytes

    @property
    def n_bytes(self) -> int:
        """Size of the finished file."""
        return len(self.header) + sum(tensor.spec.n_bytes for tensor in self.tensors)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MergePlan:
    """Everything that will be written."""

    binding: Binding
    read_options: ReadOptions
    options: MergeOptions
    dtype: DType | None
    """The dtype that floating tensors are cast to; None keeps each tensor's own."""
    shards: tuple[ShardPlan, ...]
    config: Mapping[str, Any]
    """``config.json`` as it will be, edits and dtype applied; empty when the base has none. Of a pipeline, the
    components' are in it under their names."""
    companions: Mapping[str, Path]
    """Other files that travel: name in the output, and where from."""
    findings: tuple[Finding, ...]
    """Those of binding and planning."""
    n_whole_bytes: int = 0
    """Memory for what is held whole, where row blocks are not written as they come."""

    @property
    def tensors(self) -> Iterator[PlannedTensor]:
        """Every output tensor, in order."""
        return (tensor for shard in self.shards for tensor in shard.tensors)

    @property
    def n_bytes(self) -> int:
        """Size of all weight files."""
        return sum(shard.n_bytes for shard in self.shards)

    @property
    def n_updates_bytes(self) -> int:
        """Size of the adapters' own tensors."""
        return sum(
            entry.update.n_bytes for t in self.tensors for entry in t.updates if isinstance(entry.update, Update)
        )


def plan_merge(
    binding: Binding,
    options: MergeOptions,
    *,
    read_options: ReadOptions | None = None,
    companions: Mapping[str, Path] | None = None,
) -> MergePlan:
    """Plan a merge.

    Raises:
        RecipeError: The dtype or the shard size cannot be obeyed.
    """
    dtype = _output_dtype(options.dtype)
    tensors = [_planned(binding, name, source, dtype) for name, source in binding.outputs.items()]
    shards = tuple(_shards(binding, tensors, options.max_shard_bytes))
    return MergePlan(
        binding=binding,
        read_options=read_options or ReadOptions(),
        options=options,
        dtype=dtype,
        shards=shards,
        config=_edited_config(binding, dtype),
        companions=dict(companions or {}),
        findings=(*binding.findings, *_range_findings(binding, dtype)),
    )


def _output_dtype(name: str) -> DType | None:
    if name == "base":
        return None
    choices = {dtype.long_name: dtype for dtype in (DType.F16, DType.BF16, DType.F32)}
    if name not in choices:
        raise RecipeError(f"dtype: found {name!r}, expected one of {', '.join([*choices, 'base'])}")
    return choices[name]


def _planned(binding: Binding, name: str, source_name: str | None, dtype: DType | None) -> PlannedTensor:
    source = binding.checkpoint.tensors[source_name] if source_name is not None else None
    updates = binding.updates.get(name, ())
    shape = _shape(binding, name, source)
    stored = _stored_dtype(binding, name, source, updates, dtype)
    spec = TensorSpec(name=name, dtype=stored, shape=shape, file="", start=0, stop=stored.n_bytes * _count(shape))
    return PlannedTensor(spec=spec, source=source, updates=updates, treatment=_treatment(source, updates, stored))


def _count(shape: Iterable[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _shape(binding: Binding, name: str, source: TensorSpec | None) -> tuple[int, ...]:
    if name in binding.shapes:
        return binding.shapes[name]
    if source is None:
        raise MergeError(f"{name}: neither base nor adapter has its values")
    return source.shape


def _stored_dtype(
    binding: Binding, name: str, source: TensorSpec | None, updates: tuple[ModuleUpdate, ...], dtype: DType | None
) -> DType:
    if source is not None:
        own = source.dtype
    else:
        own = next(dtype_of(entry.update.values) for entry in updates if isinstance(entry.update, Replacement))
        own = _usual_dtype(binding.checkpoint.owner_of(name)[0]) if own.is_floating else own
    model, inner = binding.checkpoint.owner_of(name)
    if dtype is None or not own.is_floating or is_kept(inner, model.config, dtype):
        return own
    return dtype


def _usual_dtype(model: Checkpoint) -> DType:
    """The floating dtype that most of a model's bytes are stored in: what an added head is cast to."""
    sizes: dict[DType, int] = {}
    for spec in model.tensors.values():
        if spec.dtype.is_floating:
            sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.n_bytes
    return max(sizes, key=lambda dtype: sizes[dtype], default=DType.F32)


def _treatment(source: TensorSpec | None, updates: tuple[ModuleUpdate, ...], stored: DType) -> Treatment:
    if source is None:
        return Treatment.ADDED
    if updates:
        is_replaced = all(isinstance(entry.update, Replacement) for entry in updates)
        return Treatment.REPLACED if is_replaced else Treatment.MERGED
    return Treatment.UNTOUCHED if source.dtype is stored else Treatment.CAST


def _shards(binding: Binding, tensors: list[PlannedTensor], max_bytes: int) -> Iterator[ShardPlan]:
    if max_bytes < 1:
        raise RecipeError(f"max shard size: found {max_bytes} bytes, expected at least 1")
    planned = {tensor.spec.name: tensor for tensor in tensors}
    if not binding.checkpoint.components:
        files = files_of_model({name: tensor.spec for name, tensor in planned.items()}, max_bytes)
    elif max_bytes == MergeOptions().max_shard_bytes:
        files = files_of_pipeline(binding.checkpoint, binding.outputs)
    else:
        raise RecipeError("max shard size: a pipeline's components keep the files that they have", hint="leave it out")
    for file, names in files.items():
        yield _shard(binding.checkpoint, file, [planned[name] for name in names])


def _shard(checkpoint: Checkpoint, file: str, tensors: list[PlannedTensor]) -> ShardPlan:
    placed, start = [], 0
    for tensor in tensors:
        stop = start + tensor.spec.n_bytes
        placed.append(replace(tensor, spec=replace(tensor.spec, file=file, start=start, stop=stop)))
        start = stop
    header = None
    if checkpoint.components and all(tensor.treatment is Treatment.UNTOUCHED for tensor in placed):
        header = untouched_header(checkpoint, file, [tensor.source for tensor in placed if tensor.source])
    if header is None:
        specs = (replace(t.spec, name=checkpoint.owner_of(t.spec.name)[1]) for t in placed)
        header = format_header(specs, _METADATA)
    return ShardPlan(file=file, tensors=tuple(placed), header=header)


def _edited_config(binding: Binding, dtype: DType | None) -> dict[str, Any]:
    config: dict[str, Any] = _deep_copy(binding.checkpoint.config)
    for path, value in binding.config_edits.items():
        _set(config, path.split("."), value)
    if dtype is not None:
        for model in [config[name] for name in binding.checkpoint.components] or [config]:
            # Models of diffusers have no such entry, and would warn of one.
            _set_dtype(model, dtype.long_name, is_outermost=bool(model) and "_class_name" not in model)
    return config


def _deep_copy(value: Any) -> Any:  # noqa: ANN401 - JSON
    if isinstance(value, Mapping):
        return {key: _deep_copy(item) for key, item in value.items()}
    return [_deep_copy(item) for item in value] if isinstance(value, list) else value


def _set(config: dict[str, Any], path: list[str], value: object) -> None:
    for key in path[:-1]:
        config = config.setdefault(key, {})
    config[path[-1]] = value


def _set_dtype(config: dict[str, Any], name: str, *, is_outermost: bool) -> None:
    """Say the dtype that is really there, under whichever key the configuration uses (``dtype`` in transformers 5)."""
    keys = [key for key in ("dtype", "torch_dtype") if key in config]
    for key in keys or (["torch_dtype"] if is_outermost else []):
        config[key] = name
    for value in config.values():
        if isinstance(value, dict):
            _set_dtype(value, name, is_outermost=False)


def _range_findings(binding: Binding, dtype: DType | None) -> Iterator[Finding]:
    known = OVERFLOWS_FLOAT16.intersection(model_types(binding.checkpoint.config))
    if dtype is DType.F16 and known:
        yield Finding(
            code="float16-activations",
            severity=Severity.WARN,
            target="config.json",
            message=f"{', '.join(sorted(known))} models are known to overflow float16 in their activations; "
            "consider --dtype bfloat16 or --dtype base",
        )
