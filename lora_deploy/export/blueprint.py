"""What a graph depends on, and nothing else: configuration, tensor names, shapes and dtypes, options, versions.

Promise (law 8): no floating weight is part of a blueprint, so that a base and everything merged into it have one; what
an adapter changes in shape, ties or configuration gives another. Integer tensors are part of it, since graphs may hold
what they decide.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_deploy.errors import ExportError
from lora_deploy.export.extras import installed_version
from lora_deploy.export.sources import WeightSource, components_of, equal_groups
from lora_deploy.pipeline_layout import MODEL_INDEX, SEPARATOR
from lora_deploy.safetensors_file import format_header, write_file
from lora_deploy.tensors import DType, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 3
"""Counted up when the same blueprint would give another graph or table."""
_NOT_OF_THE_GRAPH = frozenset(
    {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "_commit_hash", "_diffusers_version"}
)
_VECTOR_SPREAD = 0.25
_MAX_DRAWS = 64


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Blueprint:
    """Identity of a graph, and what is needed to make it."""

    config: Mapping[str, Any]
    specs: Mapping[str, TensorSpec]
    """Names and shapes, with the dtypes that the weights have on their way into the graph."""
    equal: tuple[tuple[str, ...], ...]
    """Names that are one matrix."""
    components: tuple[str, ...] = ()
    """Of a pipeline; the configurations are in ``config`` under their names."""
    integers: Mapping[str, bytes]
    """Contents of the tensors that are not floating."""
    dtype: DType
    provider: str
    maker: str
    is_stored: bool
    versions: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Everything that decides the graph."""
        return {
            "format": FORMAT,
            "config": self.config,
            "tensors": {name: [spec.dtype.value, list(spec.shape)] for name, spec in sorted(self.specs.items())},
            "equal": [list(group) for group in self.equal],
            "integers": {name: hashlib.sha256(values).hexdigest() for name, values in self.integers.items()},
            "dtype": self.dtype.value,
            "provider": self.provider,
            "maker": self.maker,
            "is_stored": self.is_stored,
            "versions": dict(self.versions),
        }

    @property
    def digest(self) -> str:
        """The sha256 of its canonical JSON."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def blueprint_of(
    source: WeightSource, *, dtype: DType, provider: str, maker: str, packages: Sequence[str], is_stored: bool
) -> Blueprint:
    """Take from weights what their graph depends on.

    Raises:
        ExportError: There is no configuration, or the weights are quantised.
    """
    if not source.config:
        raise ExportError(
            f"{source.name}: has no config.json, which says what model its weights are of", code="no-config"
        )
    components = components_of(source)
    if any("quantization_config" in config for config in (source.config, *(source.config[c] for c in components))):
        raise ExportError(f"{source.name}: config.json says that it is quantised; graphs are made of plain weights")
    names = [name for name, spec in source.specs.items() if not spec.dtype.is_floating]
    return Blueprint(
        config=_whole_config(source.config, components, dtype),
        components=components,
        specs={name: _on_the_way(spec, dtype) for name, spec in source.specs.items()},
        equal=tuple(equal_groups(source)),
        integers=_contents_of(source, names),
        dtype=dtype,
        provider=provider,
        maker=maker,
        is_stored=is_stored,
        versions={"python": platform.python_version(), **{name: installed_version(name) or "-" for name in packages}},
    )


def _contents_of(source: WeightSource, names: Sequence[str]) -> dict[str, bytes]:
    if not names:
        return {}
    from lora_deploy.merge.shard import bytes_of

    return dict(zip(names, (bytes(bytes_of(values)) for values in source.tensors(names)), strict=True))


def _graph_config(config: Mapping[str, Any], dtype: DType) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if key not in _NOT_OF_THE_GRAPH}
    return {**{key: _plain(value) for key, value in kept.items()}, "dtype": dtype.long_name}


def _whole_config(config: Mapping[str, Any], components: Sequence[str], dtype: DType) -> dict[str, Any]:
    """The model's; or the pipeline's class and its models', as schedulers and tokenizers decide no graph."""
    if not components:
        return _graph_config(config, dtype)
    models = {name: _graph_config(config[name], dtype) for name in sorted(components)}
    for model in models.values():
        if "_class_name" in model:
            del model["dtype"]  # no entry of diffusers' own
    return {"_class_name": config.get("_class_name"), **models}


def _plain(value: Any) -> Any:  # noqa: ANN401 - JSON
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if key not in _NOT_OF_THE_GRAPH}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _on_the_way(spec: TensorSpec, dtype: DType) -> TensorSpec:
    """The tensor as the graph's table sees it: in float32 graphs every float is float32."""
    stored = dtype if spec.dtype.is_floating and dtype is DType.F32 else spec.dtype
    n_bytes = stored.n_bytes * math.prod(spec.shape)
    return TensorSpec(name=spec.name, dtype=stored, shape=spec.shape, file="", start=0, stop=n_bytes)


def write_synthetic(blueprint: Blueprint, folder: Path, seed: int) -> None:
    """Write a checkpoint of these names, shapes and dtypes with random weights: no two tensors, rows or columns alike.

    Equal groups stay equal and integers keep their values. Vectors lie around 1 and are positive, as norms, scales and
    variances want; matrices around 0.
    """
    folder.mkdir(parents=True)
    specs = sorted(blueprint.specs.values(), key=lambda spec: _order(blueprint, spec))
    contents = _contents(blueprint, specs, seed)
    if not blueprint.components:
        _write_model(folder, blueprint.config, specs, contents)
        return
    index: dict[str, Any] = {"_class_name": blueprint.config["_class_name"]}
    for component in blueprint.components:
        prefix, config = component + SEPARATOR, blueprint.config[component]
        own = [replace(spec, name=spec.name.removeprefix(prefix)) for spec in specs if spec.name.startswith(prefix)]
        (folder / component).mkdir()
        _write_model(folder / component, config, own, itertools.islice(contents, len(own)))
        is_diffusers = "_class_name" in config
        name = config["_class_name"] if is_diffusers else (config.get("architectures") or ["unknown"])[0]
        index[component] = ["diffusers" if is_diffusers else "transformers", name]
    (folder / MODEL_INDEX).write_text(json.dumps(index, indent=2))


def _order(blueprint: Blueprint, spec: TensorSpec) -> int:
    """Position of the tensor's component; all are alike in a single model."""
    component = spec.name.partition(SEPARATOR)[0]
    return blueprint.components.index(component) if blueprint.components else 0


def _write_model(
    folder: Path, config: Mapping[str, Any], specs: Sequence[TensorSpec], contents: Iterator[memoryview]
) -> None:
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2))
    placed, start = [], 0
    for spec in specs:
        stop = start + spec.n_bytes
        placed.append(TensorSpec(name=spec.name, dtype=spec.dtype, shape=spec.shape, file="", start=start, stop=stop))
        start = stop
    header = format_header(placed, {"format": "pt"})
    name = "diffusion_pytorch_model.safetensors" if "_class_name" in config else "model.safetensors"
    write_file(folder / name, header, contents, root=folder)


def _contents(blueprint: Blueprint, specs: Sequence[TensorSpec], seed: int) -> Iterator[memoryview]:
    """Draw the tensors' values, in their order, which is that of components too."""
    from lora_deploy.merge.shard import bytes_of

    leader = {name: group[0] for group in blueprint.equal for name in group}
    position = {spec.name: number for number, spec in enumerate(specs)}
    seen: set[bytes] = set()
    for spec in specs:
        if spec.name in blueprint.integers:
            yield memoryview(blueprint.integers[spec.name])
            continue
        first = leader.get(spec.name, spec.name)
        for draw in range(_MAX_DRAWS):  # a scalar of 16 bits may well have been drawn before
            values = bytes_of(_random(spec, seed + 2 * (position[first] + draw * len(specs))))
            digest = hashlib.blake2b(values, digest_size=16).digest()
            if digest not in seen or first != spec.name:
                break
        seen.add(digest)
        yield values


def _random(spec: TensorSpec, seed: int) -> Tensor:
    import torch

    from lora_deploy.rounding import torch_dtype

    generator = torch.Generator().manual_seed(seed)
    if len(spec.shape) < 2:
        values = 1 + _VECTOR_SPREAD * (2 * torch.rand(spec.shape, generator=generator) - 1)
    else:
        # Outputs as large as inputs: with smaller ones attention would be even, and a wrong mask or rotation not show.
        values = torch.randn(spec.shape, generator=generator) / math.sqrt(max(1, math.prod(spec.shape[1:])))
    return values.to(torch_dtype(spec.dtype))
