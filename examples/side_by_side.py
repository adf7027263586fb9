"""Compare the greedy replies of a base, the base with its adapter unmerged, and the merged model.

The unmerged and the merged model are not the same numbers: the merged weights were rounded once, to the dtype they are
stored in. So their logits differ a little, and where the two best tokens are nearly equal either may win. Therefore the
rule: the largest difference of any logit is measured, and where the best token leads the second by more than ten times
that difference at every step of a reply, both models must give exactly the same tokens, and so must the merged model's
graphs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch

from lora_deploy.export.generate import greedy_tokens
from lora_deploy.export.record import read_record

if TYPE_CHECKING:
    from collections.abc import Container, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel

SAFETY = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a model said, greedily."""

    tokens: tuple[int, ...]
    margins: tuple[float, ...]
    """At every step: logit of the best token minus logit of the second."""
    text: str = ""

    @property
    def smallest_margin(self) -> float:
        """Lead of the best token where it was smallest."""
        return min(self.margins)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One prompt, answered by the three models, and by the graphs of the merged one."""

    prompt: str
    base: Reply
    unmerged: Reply
    merged: Reply
    onnx: Reply
    """Of the merged model's exported graphs; margins unknown."""
    logit_error: float
    """Largest difference of any logit between unmerged and merged, along the unmerged reply."""


def greedy_reply(model: PreTrainedModel, prompt_tokens: Sequence[int], *, max_new_tokens: int) -> Reply:
    """Continue the prompt with the best token at every step."""
    prompt = torch.tensor([list(prompt_tokens)])
    with torch.inference_mode():
        done = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            output_logits=True,
            return_dict_in_generate=True,
        )
    best_two = torch.stack([logits[0] for logits in done.logits]).topk(2).values
    return Reply(
        tokens=tuple(done.sequences[0, prompt.shape[1] :].tolist()),
        margins=tuple((best_two[:, 0] - best_two[:, 1]).tolist()),
    )


def graphs_reply(folder: Path, prompt_tokens: Sequence[int], *, ends: Container[int], max_new_tokens: int) -> Reply:
    """Continue the prompt with the best token at every step, by the graphs of an export."""
    found = greedy_tokens(folder, read_record(folder), prompt_tokens, len(prompt_tokens) + max_new_tokens)
    tokens: list[int] = []
    for token in islice(found, max_new_tokens):
        tokens.append(token)
        if token in ends:
            break
    return Reply(tokens=tuple(tokens), margins=())


def reply_logits(model: PreTrainedModel, prompt_tokens: Sequence[int], reply: Reply) -> torch.Tensor:
    """Compute the logits (reply length, vocabulary) from which each token of the reply was, or would be, chosen."""
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([[*prompt_tokens, *reply.tokens]])).logits[0]
    return logits[len(prompt_tokens) - 1 : -1]


def largest_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest absolute difference of two equally shaped sets of logits; a NaN stays a NaN."""
    return (one - other).abs().max().item()


def decisive(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Select the prompts whose every step is decided by more than ten times the largest logit error of all prompts."""
    threshold = SAFETY * max(comparison.logit_error for comparison in comparisons)
    return [comparison for comparison in comparisons if comparison.unmerged.smallest_margin > threshold]


def faults(comparisons: Sequence[Comparison]) -> list[str]:
    """List everything that contradicts: unmerged and merged are the same model, and not the base."""
    found = [
        f"{comparison.prompt!r}: logit error is {comparison.logit_error}"
        for comparison in comparisons
        if not math.isfinite(comparison.logit_error)
    ]
    if found:
        return found
    selected = decisive(comparisons)
    if not selected:
        found.append("no prompt is decisive: every reply has a step within ten times the logit error")
    found += [
        f"{comparison.prompt!r}: unmerged and {name} give different tokens"
        for comparison in selected
        for name, reply in (("merged", comparison.merged), ("onnx", comparison.onnx))
        if comparison.unmerged.tokens != reply.tokens
    ]
    found += [
        f"{comparison.prompt!r}: {name} says what the base says"
        for comparison in comparisons
        for name, reply in (("unmerged", comparison.unmerged), ("merged", comparison.merged), ("onnx", comparison.onnx))
        if reply.tokens == comparison.base.tokens
    ]
    return found
