"""Run a torch model over probes: the rows of its outputs that mean something, and its greedy continuation.

Promise: everything is computed in the model's own dtype (float32 for every reference) and given as float32 rows, one
for each real position (padding left out) or each item of a batch; no sampling, no generation settings of a checkpoint.
"""

from __future__ import annotations

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
    """Cut an output into rows: real positions from ``start`` on, or items of the batch.

    Shapes: (batch, sequence - start, …) gives (real positions, product of the rest); (batch, …) gives (batch, rest).
    """
    mask = probe.mask
    value = value.detach().to(torch.float32)
    if mask is not None and value.ndim >= 3 and value.shape[:2] == mask[:, start:].shape:
        return value[mask[:, start:]].flatten(1)
    return value.reshape(value.shape[0], -1) if value.ndim > 1 else value.reshape(-1, 1)


@contextmanager
def quiet_peers() -> Iterator[None]:
    """Leave unheard what other packages advise about models that are run on purpose as they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _typed(inputs: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def _continue(model: nn.Module, probe: Probe) -> tuple[Tensor, Tensor]:
    """Choose the best token, again and again: over the model's cache where it gives one, else from the start."""
    inputs = dict(probe.inputs)
    mask = inputs["attention_mask"]
    tokens, margins, cache = [], [], None
    for _ in range(probe.n_new_tokens):
        output = model(**inputs, use_cache=True, return_dict=True, past_key_values=cache)
        best = output.logits[0, -1].float().topk(2)
        tokens.append(best.indices[:1])
        margins.append(best.values[0] - best.values[1])
        cache = getattr(output, "past_key_values", None)
        mask = torch.cat([mask, mask.new_ones(1, 1)], dim=1)
        chosen = best.indices[:1].reshape(1, 1)
        ids = chosen if cache is not None else torch.cat([inputs["input_ids"], chosen], dim=1)
        inputs |= {"input_ids": ids, "attention_mask": mask}
        if "position_ids" in inputs:
            inputs["position_ids"] = positions(mask)[:, -ids.shape[1] :]
    return torch.cat(tokens), torch.stack(margins).float()
