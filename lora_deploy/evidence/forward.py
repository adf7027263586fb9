"""Run a torch model over probes: the rows of its outputs that mean something, and its greedy continuation.

Promise: everything is computed in the model's own dtype (float32 for every reference) and given as float32 rows, one
for each real position (padding left out) or each item of a batch; no sampling, no generation settings of a checkpoint.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lora_deploy.errors import EvidenceError
from lora_deploy.evidence.probe import Probe, positions

Outputs: TypeAlias = "Mapping[str, Mapping[str, Tensor]]"
"""Rows (n, width) float32 by probe and output name."""
LOGITS = "logits"
TOKENS, MARGINS = "greedy tokens", "greedy margins"
"""Greedy continuations are kept as outputs of these names: (n,) int64, and how far the best token led."""
_NOT_COMPARED = frozenset({"loss", "past_key_values", "hidden_states", "attentions", "encoder_last_hidden_state"})


@torch.inference_mode()
def run_probes(model: nn.Module, probes: Sequence[Probe], *, greedy: bool = True) -> dict[str, dict[str, Tensor]]:
    """Run every probe once, and continue those that say so.

    Raises:
        EvidenceError: The model does not take a probe.
    """
    return {probe.name: _run(model, probe, greedy=greedy) for probe in probes}


def _run(model: nn.Module, probe: Probe, *, greedy: bool) -> dict[str, Tensor]:
    try:
        with quiet_peers():
            output = model(**_typed(probe.inputs, model), return_dict=True)
            found = {name: rows_of(probe, value) for name, value in tensors_in(output)}
            if greedy and probe.n_new_tokens and LOGITS in found:
                tokens, margins = _continue(model, probe)
                found |= {TOKENS: tokens, MARGINS: margins}
    except Exception as error:  # the model's own code may raise anything
        problem = f"{type(error).__name__}: {error}"
        raise EvidenceError(f"{type(model).__name__} does not run on {probe.description}: {problem}") from error
    return found


def tensors_in(output: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Give the outputs that are compared: floating tensors that are no by-product."""
    for name, value in output.items():
        if name not in _NOT_COMPARED and isinstance(value, Tensor) and value.is_floating_point():
            yield name, value


def rows_of(probe: Probe, value: Tensor, start: int = 0) -> Tensor:
    """Cut an output into rows: real positions from ``start`` on, places of images and frames, or items of the batch.

    Shapes: (batch, sequence - start, …) gives (real positions, product of the rest), (batch, frames, width) gives
    (batch * frames, width), (batch, channels, height, width) gives (batch * height * width, channels), and
    (batch, width) stays.
    """
    mask = probe.mask
    value = value.detach().to(torch.float32)
    if mask is not None and value.ndim >= 3 and value.shape[:2] == mask[:, start:].shape:
        return value[mask[:, start:]].flatten(1)
    if value.ndim == 3:
        return value.flatten(0, 1)
    if value.ndim == 4:
        return value.movedim(1, -1).flatten(0, 2)
    return value.reshape(value.shape[0], -1) if value.ndim > 1 else value.reshape(-1, 1)


@contextmanager
def quiet_peers() -> Iterator[None]:
    """Leave unheard what other packages advise about models that are run on purpose as they are.

    bitsandbytes, which PEFT imports where it is installed, misses a package on some processors.
    """
    advice = logging.getLogger("bitsandbytes")
    level = advice.level
    advice.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        advice.setLevel(level)


def _typed(inputs: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def _continue(model: nn.Module, probe: Probe) -> tuple[Tensor, Tensor]:
    """Choose the best token, again and again: over the model's cache where it gives one, else from the start."""
    inputs = answer_start(probe)
    ids_name = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    tokens, margins = [], []
    output = model(**_typed(inputs, model), use_cache=True, return_dict=True)
    while True:
        best = output.logits[0, -1].float().topk(2)
        tokens.append(best.indices[:1])
        margins.append(best.values[0] - best.values[1])
        if len(tokens) == probe.n_new_tokens:
            return torch.cat(tokens), torch.stack(margins).float()
        cache = getattr(output, "past_key_values", None)
        chosen = best.indices[:1].reshape(1, 1)
        ids = chosen if cache is not None else torch.cat([inputs[ids_name], chosen], dim=1)
        inputs = following(inputs, ids)
        given = inputs if cache is not None else inputs | _images(probe)
        context = {"encoder_outputs": (output.encoder_last_hidden_state,)} if ids_name != "input_ids" else {}
        output = model(**_typed(given, model), **context, use_cache=True, return_dict=True, past_key_values=cache)


def answer_start(probe: Probe) -> dict[str, Tensor]:
    """Give the inputs that a greedy continuation starts from: all of them, of an answer only the first token."""
    return probe.upto(1) if "decoder_input_ids" in probe.inputs else dict(probe.inputs)


def following(inputs: Mapping[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
    """Give the inputs of the step after ``inputs``, (batch, tokens) ``ids``: mask and positions grow by one token."""
    mask = inputs.get("attention_mask")
    if "decoder_input_ids" in inputs:
        return {"decoder_input_ids": ids} | ({} if mask is None else {"attention_mask": mask})
    assert mask is not None  # noqa: S101 - a decoder's probe has one
    mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    found = {"input_ids": ids, "attention_mask": mask}
    return found | ({"position_ids": positions(mask)[:, -ids.shape[1] :]} if "position_ids" in inputs else {})


def _images(probe: Probe) -> dict[str, Tensor]:
    return {name: value for name, value in probe.inputs.items() if name == "pixel_values"}
