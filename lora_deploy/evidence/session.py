"""Graphs run by onnxruntime, as a model is: inputs by name, outputs by name, the cache carried from step to step.

Promise: the provider that was asked for runs, or it is said that it does not; onnxruntime itself would fall back in
silence. What a graph wants is read from the graph: names, types and shapes of inputs; nothing is assumed of its maker.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lora_deploy.checkpoint import read_json
from lora_deploy.errors import EvidenceError, ExportError, InconclusiveError, RecipeError
from lora_deploy.evidence.placement import Placement, placement_of
from lora_deploy.export import runtime

_TYPES = {
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
    "tensor(float16)": torch.float16,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(bool)": torch.bool,
}
CachePlace: TypeAlias = "tuple[str, str, str]"
"""Layer, owner (the text or the encoder's output) and kind, keys or values; makers of graphs name them differently."""
_CACHE = re.compile(r"past|present")
_PREFIX = re.compile(r"past_key_values?|past|present")
_LAYER, _KIND, _OF_ENCODER = re.compile(r"\d+"), re.compile(r"key|value"), re.compile(r"cross|encoder")
_SIDE = re.compile(r"^(?:input|output)\.")
"""What transformers' exporter puts before a name that is both an input and an output."""
_SEGMENTS = "token_type_ids"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Session:
    """One graph, loaded."""

    path: Path
    provider: str
    """Full name of the provider that runs it."""
    inputs: Mapping[str, Any]
    """Nodes by name, as onnxruntime describes them."""
    outputs: Mapping[str, Any]
    """As inputs."""
    cache: Mapping[str, CachePlace]
    """Cache inputs by name, each with what it holds."""
    placement: Placement
    """Which provider runs which node."""
    settings: Mapping[str, str]
    """What the provider says that it was told, TensorFloat-32 among it."""
    _session: Any

    @property
    def takes_cache(self) -> bool:
        """Whether it continues a text without computing it again."""
        return bool(self.cache)

    def run(self, inputs: Mapping[str, Tensor], cache: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Run the graph on the inputs it knows; a cache that is not given is empty.

        Raises:
            EvidenceError: onnxruntime does not run it.
            InconclusiveError: It wants an input that is not given.
        """
        values = self.compute(self.feed(inputs, cache))
        return {name: torch.from_numpy(value) for name, value in zip(self.outputs, values, strict=True)}

    def feed(self, inputs: Mapping[str, Tensor], cache: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
        """Prepare inputs in the graph's own names and formats.

        Raises:
            InconclusiveError: It wants an input that is not given.
        """
        batch = next(iter(inputs.values())).shape[0]
        feeds = {}
        for name, node in self.inputs.items():
            value = inputs.get(plain(name)) if name not in self.cache else (cache or {}).get(name)
            if value is None and name == _SEGMENTS and "input_ids" in inputs:
                value = torch.zeros_like(inputs["input_ids"])  # one segment
            if value is None and name in self.cache:
                shape = _empty_shape(node.shape, batch, head_size(self.path.parent))
                value = torch.zeros(shape, dtype=_dtype(self.path, node))
            if value is None:
                raise InconclusiveError(f"{self.path}: wants an input {name} that the probes do not have")
            feeds[name] = value.to(_dtype(self.path, node)).contiguous().numpy()
        return feeds

    def compute(self, feeds: Mapping[str, Any]) -> list[Any]:
        """Run the graph on prepared inputs; nothing else, so that it can be timed.

        Raises:
            EvidenceError: onnxruntime does not run it.
        """
        try:
            found: list[Any] = self._session.run(None, feeds)
        except Exception as error:  # onnxruntime raises classes of its own
            raise EvidenceError(f"{self.path}: onnxruntime does not run it: {error}") from error
        return found

    def bind(self, feeds: Mapping[str, Any]) -> Bound:
        """Put prepared inputs where the provider computes, so that running is nothing but running."""
        import onnxruntime

        device = runtime.DEVICES.get(self.provider, "cpu")
        binding = self._session.io_binding()
        for name, value in feeds.items():
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(value, device, 0))
        for name in self.outputs:
            binding.bind_output(name, device)
        binding.synchronize_inputs()
        return Bound(path=self.path, _session=self._session, _binding=binding)

    def next_cache(self, *outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take from earlier steps' outputs what the next one continues: of this graph, or of the one that read a text.

        Later ones win; what they do not give again (keys and values of an encoder's output) is kept.
        """
        found = {_place(name): value for step in outputs for name, value in step.items() if _CACHE.search(name)}
        return {name: found[place] for name, place in self.cache.items() if place in found}

    def misfit(self, inputs: Mapping[str, Tensor], supplied: Iterable[str] = ()) -> str:
        """Say which input is missing, or of another size than the graph was made for; empty where all fit.

        ``supplied`` are inputs that come from elsewhere.
        """
        for name, node in self.inputs.items():
            value = inputs.get(plain(name))
            if name in self.cache or plain(name) in supplied:
                continue
            if value is None and not (name == _SEGMENTS and "input_ids" in inputs):
                return f"{self.path.name} wants an input {plain(name)}"
            if value is None:
                continue
            sizes = zip(node.shape, value.shape, strict=False)
            if len(node.shape) != value.ndim or any(isinstance(size, int) and size != found for size, found in sizes):
                return f"{plain(name)}: found {list(value.shape)}, {self.path.name} takes {node.shape}"
        return ""

    def is_cache(self, name: str) -> bool:
        """Whether an input or output is part of the cache."""
        return _CACHE.search(name) is not None

    @property
    def float_type(self) -> torch.dtype:
        """Format that it computes in, as its outputs show; float32 where they do not."""
        types = [_TYPES.get(node.type) for node in self.outputs.values()]
        return next((dtype for dtype in types if dtype is not None and dtype.is_floating_point), torch.float32)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Bound:
    """A graph with its inputs on the device."""

    path: Path
    _session: Any
    _binding: Any

    def run(self) -> None:
        """Run the graph and wait for it; outputs stay where they are.

        Raises:
            EvidenceError: onnxruntime does not run it.
        """
        try:
            self._session.run_with_iobinding(self._binding)
            self._binding.synchronize_outputs()
        except Exception as error:  # onnxruntime raises classes of its own
            raise EvidenceError(f"{self.path}: onnxruntime does not run it: {error}") from error

    def outputs(self) -> list[Any]:
        """Copy the outputs to the CPU, in the graph's order."""
        found: list[Any] = self._binding.copy_outputs_to_cpu()
        return found


def open_session(path: Path, *, provider: str = "cpu", n_threads: int = 1) -> Session:
    """Load a graph.

    Raises:
        RecipeError: No provider has that name.
        InconclusiveError: onnxruntime is not installed, or the provider is not there or did not load.
        EvidenceError: onnxruntime does not load the graph.
    """
    wanted = runtime.PROVIDERS.get(provider.lower())
    if wanted is None:
        raise RecipeError(f"provider: found {provider!r}, expected one of {', '.join(runtime.PROVIDERS)}")
    try:
        session = runtime.open_session(path, provider.lower(), n_threads)
    except ExportError as error:
        if error.code in {"extra-missing", "extra-conflict"}:
            raise InconclusiveError(f"{error.message}: no graph can be run", hint=error.hint) from error
        if error.code in {runtime.MISSING, runtime.FELL_BACK}:
            hint = error.hint or "a verdict for one provider never stands for another"
            raise InconclusiveError(error.message, hint=hint) from error
        raise EvidenceError(error.message, hint=error.hint) from error
    inputs = {node.name: node for node in session.get_inputs()}
    return Session(
        path=path,
        provider=wanted,
        inputs=inputs,
        outputs={node.name: node for node in session.get_outputs()},
        cache={name: place for name in inputs if _CACHE.search(name) and (place := _place(name)) is not None},
        placement=placement_of(session, wanted),
        settings=session.get_provider_options().get(wanted, {}),
        _session=session,
    )


def plain(name: str) -> str:
    """Name an input or output as the model does."""
    return _SIDE.sub("", name)


def _place(name: str) -> CachePlace | None:
    rest = _PREFIX.sub("", plain(name))
    layer, kind = _LAYER.search(rest), _KIND.search(rest)
    owner = "encoder" if _OF_ENCODER.search(rest) else ""
    return (layer[0], owner, kind[0]) if layer and kind else None


def _empty_shape(shape: list[Any], batch: int, width: int) -> list[int]:
    """The shape of a cache that holds nothing: (batch, heads, 0, width); some graphs do not say their width."""
    sizes = [size if isinstance(size, int) else int(size) if str(size).isdigit() else None for size in shape]
    last = width if sizes[-1] is None else sizes[-1]
    return [batch, *(0 if size is None else size for size in sizes[1:-1]), last]


@cache
def head_size(folder: Path) -> int:
    """Width of a cached key, as the configurations beside a graph say it; 0 where none does."""
    for name, path in (("genai_config.json", ("model", "decoder", "head_size")), ("config.json", ("head_dim",))):
        found: Any = read_json(folder / name) if (folder / name).is_file() else None
        for key in path:
            found = found.get(key) if isinstance(found, dict) else None
        if isinstance(found, int):
            return found
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    width, n_heads = config.get("hidden_size"), config.get("num_attention_heads")
    return width // n_heads if isinstance(width, int) and isinstance(n_heads, int) and n_heads else 0


def _dtype(path: Path, node: Any) -> torch.dtype:  # noqa: ANN401 - as above
    if node.type not in _TYPES:
        raise InconclusiveError(f"{path}: input {node.name} is a {node.type}, which cannot be fed from here")
    return _TYPES[node.type]
