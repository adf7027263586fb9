"""An ONNX model over the probes: reading whole texts, continuing them over a cache, and choosing tokens greedily.

Promise: the same inputs as the reference's, row for row; decoding goes one token at a time over a cache that is never
empty, in batches of one and of several padded on the left.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lora_deploy.evidence.forward import LOGITS, TOKENS, rows_of, tensors_in
from lora_deploy.evidence.graphs import GraphFolder
from lora_deploy.evidence.probe import Probe, positions
from lora_deploy.evidence.session import Session, open_folder

N_STEPS = 3
"""Tokens that are decoded over a cache, one by one."""

Rows: TypeAlias = "dict[str, dict[str, Tensor]]"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OnnxRun:
    """Everything that an ONNX model gave."""

    prefill: Rows
    decode: Rows
    """Logits of the last positions, computed over a cache; empty where the graph has none."""
    greedy: Rows
    dtype: torch.dtype
    """Format that the graph computes in."""
    facts: Mapping[str, Any]


def run_graphs(folder: GraphFolder, probes: Sequence[Probe], *, provider: str, only_prefill: bool = False) -> OnnxRun:
    """Load a folder's graphs and run the probes.

    Raises:
        EvidenceError: onnxruntime does not load or run them.
        InconclusiveError: The provider is not there, or the graph wants inputs that the probes do not have.
        RecipeError: No provider has that name.
    """
    started = time.monotonic()
    prefill, decode = open_folder(folder, provider=provider, n_threads=torch.get_num_threads())
    loaded = time.monotonic()
    continues = decode.takes_cache and not only_prefill
    left_out = [probe.name for probe in probes if not _takes(folder, probe)]
    probes = [probe for probe in probes if probe.name not in left_out]
    texts = [probe for probe in probes if "input_ids" in probe.inputs]
    return OnnxRun(
        prefill=run_prefill(prefill, probes),
        decode=run_decode(prefill, decode, texts) if continues else {},
        greedy=run_greedy(prefill, decode, texts) if continues else {},
        dtype=prefill.float_type,
        facts={
            "provider": prefill.provider,
            "provider_settings": dict(prefill.settings),
            "nodes": {session.path.name: session.placement.to_json() for session in dict.fromkeys((prefill, decode))},
            "placement": prefill.placement.summary,
            "probes_left_out": left_out,
            "graphs": [str(path.relative_to(folder.root)) for path in folder.files],
            "load_seconds": loaded - started,
            "run_seconds": time.monotonic() - loaded,
        },
    )


def _takes(folder: GraphFolder, probe: Probe) -> bool:
    """Whether a graph is made for a probe: those of onnxruntime-genai attend to padding on the left."""
    is_padded = probe.mask is not None and not bool(probe.mask.all())
    return not (is_padded and (folder.root / "genai_config.json").is_file())


def run_prefill(session: Session, probes: Sequence[Probe]) -> Rows:
    """Run every probe at once, from an empty cache."""
    found: Rows = {}
    for probe in probes:
        outputs = {name: value for name, value in session.run(probe.inputs).items() if not session.is_cache(name)}
        found[probe.name] = {name: rows_of(probe, value) for name, value in tensors_in(outputs)}
    return found


def run_decode(prefill: Session, decode: Session, probes: Sequence[Probe]) -> Rows:
    """Read all but the last few tokens of each probe, then feed those one by one; gives the logits they lead to.

    Raises:
        EvidenceError: onnxruntime does not run the graph.
    """
    found: Rows = {}
    for probe in probes:
        width, start = probe.inputs["input_ids"].shape[1], decode_start(probe)
        if start >= width:
            continue
        outputs = prefill.run(_upto(probe.inputs, start))
        steps = []
        for position in range(start, width):
            outputs = decode.run(_at(probe.inputs, position), decode.next_cache(outputs))
            steps.append(outputs[LOGITS][:, -1:])
        found[probe.name] = {LOGITS: rows_of(probe, torch.cat(steps, dim=1), start)}
    return found


def decode_start(probe: Probe) -> int:
    """Position of the first token that is decoded over the cache."""
    width = probe.inputs["input_ids"].shape[1]
    return max(1, width - N_STEPS)


def decoded_rows(probe: Probe, rows: Tensor) -> Tensor:
    """Of a probe's rows, those from the first decoded position on."""
    mask = probe.mask
    assert mask is not None  # noqa: S101 - a decoder's probe has one
    is_decoded = (torch.arange(mask.shape[1]) >= decode_start(probe)).expand_as(mask)
    return rows[is_decoded[mask]]


def run_greedy(prefill: Session, decode: Session, probes: Sequence[Probe]) -> Rows:
    """Continue each probe of batch 1 with the best token, again and again.

    Raises:
        EvidenceError: onnxruntime does not run the graph.
    """
    found: Rows = {}
    for probe in probes:
        if not probe.n_new_tokens:
            continue
        outputs = prefill.run(probe.inputs)
        mask = probe.inputs["attention_mask"]
        tokens = [outputs[LOGITS][0, -1].float().argmax().reshape(1, 1)]
        while len(tokens) < probe.n_new_tokens:
            mask = torch.cat([mask, mask.new_ones(1, 1)], dim=1)
            inputs = {"input_ids": tokens[-1], "attention_mask": mask, "position_ids": positions(mask)[:, -1:]}
            outputs = decode.run(inputs, decode.next_cache(outputs))
            tokens.append(outputs[LOGITS][0, -1].float().argmax().reshape(1, 1))
        found[probe.name] = {TOKENS: torch.cat(tokens).flatten()}
    return found


def _upto(inputs: Mapping[str, Tensor], stop: int) -> dict[str, Tensor]:
    return {name: value[:, :stop] for name, value in inputs.items()}


def _at(inputs: Mapping[str, Tensor], position: int) -> dict[str, Tensor]:
    """The inputs of one step: one token, its position, and the mask of everything up to it."""
    kept = {name: value[:, position : position + 1] for name, value in inputs.items()}
    return kept | {"attention_mask": inputs["attention_mask"][:, : position + 1]}
