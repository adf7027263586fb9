"""An ONNX model over the probes: reading whole inputs, continuing them over a cache, and choosing tokens greedily.

Promise: the same inputs as the reference's, row for row; decoding goes one token at a time over a cache that is never
empty, in batches of one and of several, padded as the graphs take it. A probe whose sizes a graph was not made for is
left out, and it is said which and why.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lora_deploy.errors import InconclusiveError
from lora_deploy.evidence.decoding import Decoding, cut, cut_by_row
from lora_deploy.evidence.forward import LOGITS, TOKENS, answer_start, following, rows_of, tensors_in
from lora_deploy.evidence.graph_model import GraphModel, open_model
from lora_deploy.evidence.graphs import GraphFolder
from lora_deploy.evidence.probe import Probe
from lora_deploy.evidence.session import plain

Rows: TypeAlias = "dict[str, dict[str, Tensor]]"
_TEXTS = ("input_ids", "decoder_input_ids")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OnnxRun:
    """Everything that an ONNX model gave."""

    prefill: Rows
    decode: Rows
    """Logits of the last positions, computed over a cache; empty where the graphs have none."""
    decoding: Mapping[str, Decoding]
    """How each probe in ``decode`` was cut."""
    padding: Mapping[str, str]
    """Which side each of them was padded on; empty where it was not."""
    greedy: Rows
    dtype: torch.dtype
    """Format that the graphs compute in."""
    inputs: tuple[tuple[str, ...], ...]
    """What each graph takes."""
    left_out: Mapping[str, str]
    """Probes that the graphs were not made for, each with the reason."""
    facts: Mapping[str, Any]


def run_graphs(folder: GraphFolder, probes: Sequence[Probe], *, provider: str, only_prefill: bool = False) -> OnnxRun:
    """Load a folder's graphs and run the probes.

    Raises:
        EvidenceError: onnxruntime does not load or run them.
        InconclusiveError: The provider is not there, or the graphs take none of the probes.
        RecipeError: No provider has that name.
    """
    started = time.monotonic()
    model = open_model(folder, provider=provider, n_threads=torch.get_num_threads())
    loaded = time.monotonic()
    left_out = {probe.name: misfit for probe in probes if (misfit := model.misfit(probe.inputs))}
    probes = [probe for probe in probes if probe.name not in left_out]
    if not probes:
        raise InconclusiveError(f"{folder.root}: takes none of the probes: {next(iter(left_out.values()), '')}")
    slices: Callable[[Probe], Decoding | None] = cut
    if has_lengths_by_row(folder):
        probes, slices = [probe.padded_right() if probe.padding else probe for probe in probes], cut_by_row
    texts = [probe for probe in probes if any(name in probe.inputs for name in _TEXTS)]
    if only_prefill or not model.continues:
        texts = []
    prefill = run_prefill(model, probes)
    decoding = {probe.name: found for probe in texts if (found := slices(probe)) is not None}
    return OnnxRun(
        prefill=prefill,
        decode={name: {LOGITS: run_decode(model, found)} for name, found in decoding.items()},
        decoding=decoding,
        padding={probe.name: probe.padding for probe in probes},
        greedy={probe.name: {TOKENS: run_greedy(model, probe)} for probe in texts if probe.n_new_tokens},
        dtype=model.dtype,
        inputs=tuple(tuple(plain(name) for name in session.inputs) for session in model.sessions),
        left_out=left_out,
        facts={
            "provider": model.prefill.provider,
            "provider_settings": dict(model.prefill.settings),
            "nodes": {session.path.name: session.placement.to_json() for session in model.sessions},
            "placement": model.prefill.placement.summary,
            "probes_left_out": left_out,
            "graphs": [str(path.relative_to(folder.root)) for path in folder.files],
            "load_seconds": loaded - started,
            "run_seconds": time.monotonic() - loaded,
        },
    )


def has_lengths_by_row(folder: GraphFolder) -> bool:
    """Whether a row's tokens lie one behind the other from place 0, and padding after them.

    So it is in graphs of onnxruntime-genai: grouped-query attention takes the rows' lengths, not a mask.
    """
    return (folder.root / "genai_config.json").is_file()


def run_prefill(model: GraphModel, probes: Sequence[Probe]) -> Rows:
    """Run every probe at once, from an empty cache."""
    found: Rows = {}
    for probe in probes:
        outputs = model.read(probe.inputs).outputs
        compared = {name: value for name, value in outputs.items() if not model.prefill.is_cache(name)}
        found[probe.name] = {name: rows_of(probe, value) for name, value in tensors_in(compared)}
    return found


def run_decode(model: GraphModel, decoding: Decoding) -> Tensor:
    """Read the beginning of a probe, then feed its tokens one by one; gives the logits of the real ones, (n, width).

    Raises:
        EvidenceError: onnxruntime does not run a graph.
    """
    step, logits = model.read(decoding.first), []
    for inputs in decoding.steps:
        step = model.go_on(inputs, step)
        logits.append(step.outputs[LOGITS][:, -1].float())
    return torch.stack(logits, dim=1)[decoding.is_fed]


def run_greedy(model: GraphModel, probe: Probe) -> Tensor:
    """Continue a probe of batch 1 with the best token, again and again: (tokens,) int64.

    Raises:
        EvidenceError: onnxruntime does not run a graph.
    """
    inputs = answer_start(probe)
    step, tokens = model.read(inputs), []
    while True:
        tokens.append(step.outputs[LOGITS][0, -1].float().argmax().reshape(1, 1))
        if len(tokens) == probe.n_new_tokens:
            return torch.cat(tokens).flatten()
        inputs = following(inputs, tokens[-1])
        step = model.go_on(inputs, step)
