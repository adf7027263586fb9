"""Prompts in, greedy replies out: the part that training's evaluation and the demo have in common."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

END_OF_REPLY = "<|im_end|>"


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read one JSON object a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def as_chat(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """Render one user message with the model's chat template, up to where the assistant's reply begins."""
    message = {"role": "user", "content": prompt}
    return str(tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True))


def greedy_replies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch: int = 20,
) -> Iterator[str]:
    """Answer every prompt greedily, ``batch`` prompts at a time, padded on the left."""
    for start in range(0, len(prompts), batch):
        chats = [as_chat(tokenizer, prompt) for prompt in prompts[start : start + batch]]
        encoded = tokenizer(chats, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        with torch.inference_mode():
            tokens = model.generate(**encoded, do_sample=False, max_new_tokens=max_new_tokens)
        replies = tokens[:, encoded["input_ids"].shape[1] :]
        yield from tokenizer.batch_decode(replies, skip_special_tokens=True)
