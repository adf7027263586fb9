"""Train the example adapter: SmolLM2-135M-Instruct learns to answer every request with one strict JSON object.

Run it from the repository root, after ``make demo`` or ``pip install -e '.[demo]'``::

    python examples/train_adapter.py --output my-adapter

It needs two CPU cores and about six minutes. It reads ``instructions.jsonl``, trains a rank-4 LoRA on all linear layers
with PEFT (loss on the reply only), stores it in float16, and writes ``loss.csv``, ``evaluation.json`` and the card
``README.md`` beside it, with the rates of strictly correct replies to ``held_back.jsonl``: the base as it is, the base
told in words what is wanted, and the adapted model.

Every random choice comes from ``--seed``. On one machine with the same package versions and ``--threads`` the same
weights result; another CPU or thread count rounds differently and gives others, equally good.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import torch
import transformers
from card import write_card
from packaged_base import BASE_ID, import_packaged_base
from replies import END_OF_REPLY, as_chat, greedy_replies, read_jsonl
from strict_json import TOPICS, fault_in
from torch.nn.functional import cross_entropy

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HERE = Path(__file__).parent
ALL_LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MAX_TOKENS = 96
MAX_REPLY_TOKENS = 64
TOLD = (
    "\nReply with one JSON object and nothing else. Its keys: topic (one of {topics}), answer (a text), "
    "confident (true or false)."
)
IGNORED_LABEL = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One conversation as token ids; the loss counts from ``reply_start`` on."""

    tokens: list[int]
    reply_start: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What one model did with the held-back prompts: numbers of prompts, and its replies."""

    n_prompts: int
    n_strict: int
    """Replies in which ``strict_json.fault_in`` finds nothing wrong."""
    n_labelled: int
    """Prompts that have a topic to compare with."""
    n_right_topic: int
    replies: dict[str, str]


def read_examples(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Tokenise the instruction set: chat template, the reply as JSON, then the token that ends it."""
    examples = []
    for row in read_jsonl(path):
        question = tokenizer(as_chat(tokenizer, row["prompt"]), add_special_tokens=False)["input_ids"]
        reply = tokenizer(json.dumps(row["reply"]) + END_OF_REPLY, add_special_tokens=False)["input_ids"]
        examples.append(Example(tokens=question + reply, reply_start=len(question)))
    longest = max(len(example.tokens) for example in examples)
    if longest > MAX_TOKENS:
        raise SystemExit(f"{path}: an example of {longest} tokens vs expected at most {MAX_TOKENS}")
    return examples


def batch_loss(model: PreTrainedModel, batch: list[Example], padding: int) -> torch.Tensor:
    """Mean cross entropy of the reply tokens of one batch, padded on the right."""
    width = max(len(example.tokens) for example in batch)
    tokens = torch.full((len(batch), width), padding)
    labels = torch.full((len(batch), width), IGNORED_LABEL)
    mask = torch.zeros((len(batch), width), dtype=torch.long)
    for row, example in enumerate(batch):
        n_tokens = len(example.tokens)
        tokens[row, :n_tokens] = torch.tensor(example.tokens)
        labels[row, example.reply_start : n_tokens] = tokens[row, example.reply_start : n_tokens]
        mask[row, :n_tokens] = 1
    logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED_LABEL)


def train(model: PreTrainedModel, examples: list[Example], padding: int, options: argparse.Namespace) -> list[float]:
    """Train the adapter in place; return the loss of every step."""
    shuffle = torch.Generator().manual_seed(options.seed)
    n_steps = options.epochs * -(-len(examples) // options.batch)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.learning_rate, weight_decay=0.0)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, n_steps // 20, n_steps)
    losses: list[float] = []
    model.train()
    for epoch in range(options.epochs):
        order = torch.randperm(len(examples), generator=shuffle).tolist()
        for start in range(0, len(order), options.batch):
            began = time.perf_counter()
            loss = batch_loss(model, [examples[i] for i in order[start : start + options.batch]], padding)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            seconds = time.perf_counter() - began
            print(f"epoch {epoch + 1} step {len(losses)}/{n_steps} loss {losses[-1]:.4f} ({seconds:.1f} s)", flush=True)
    model.eval()
    return losses


def evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], *, suffix: str = ""
) -> Evaluation:
    """Answer the held-back prompts greedily, each followed by ``suffix``, and count what is strictly right."""
    prompts = [row["prompt"] for row in rows]
    asked = [prompt + suffix for prompt in prompts]
    replies = list(greedy_replies(model, tokenizer, asked, max_new_tokens=MAX_REPLY_TOKENS))
    strict = [fault_in(reply) is None for reply in replies]
    topics = [json.loads(reply)["topic"] if ok else None for reply, ok in zip(replies, strict, strict=True)]
    labels = [row["topic"] for row in rows]
    return Evaluation(
        n_prompts=len(rows),
        n_strict=sum(strict),
        n_labelled=sum(label is not None for label in labels),
        n_right_topic=sum(label is not None and topic == label for topic, label in zip(topics, labels, strict=True)),
        replies=dict(zip(prompts, replies, strict=True)),
    )


def add_adapter(base: PreTrainedModel, options: argparse.Namespace) -> peft.PeftModel:
    """Put a fresh LoRA on every linear layer; only its factors are trained."""
    torch.manual_seed(options.seed)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.0, target_modules=ALL_LINEAR_LAYERS, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base, config)
    # PEFT noted the folder the base was loaded from; the adapter belongs to the published model.
    model.peft_config["default"].base_model_name_or_path = BASE_ID
    return model


def store(model: peft.PeftModel, folder: Path) -> None:
    """Round the factors to float16 and save them; the model keeps the rounded values: what is stored is evaluated."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float16)
    # "auto" would ask the network whether the base's vocabulary was resized; nothing here touches the embedding.
    model.save_pretrained(folder, save_embedding_layers=False)
    model.float()


def main() -> None:
    """Train, store, evaluate, write the card."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(mode=True)
    base_folder = options.base or import_packaged_base().folder
    tokenizer = transformers.AutoTokenizer.from_pretrained(base_folder)
    base = transformers.AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    examples = read_examples(HERE / "instructions.jsonl", tokenizer)
    held_back = read_jsonl(HERE / "held_back.jsonl")
    evaluations = {
        "base": evaluate(base, tokenizer, held_back),
        "base, told in words": evaluate(base, tokenizer, held_back, suffix=TOLD.format(topics=", ".join(TOPICS))),
    }

    model = add_adapter(base, options)
    began = time.perf_counter()
    losses = train(model, examples, tokenizer.pad_token_id, options)
    seconds = time.perf_counter() - began
    store(model, options.output)
    evaluations["adapted"] = evaluate(model, tokenizer, held_back)
    for title, one in evaluations.items():
        print(f"{title}: {one.n_strict} of {one.n_prompts} replies are strict, {one.n_right_topic} topics are right")

    write_losses(options.output / "loss.csv", losses)
    recorded = {title: asdict(one) for title, one in evaluations.items()}
    (options.output / "evaluation.json").write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")
    write_card(
        options.output,
        options=options,
        n_examples=len(examples),
        losses=losses,
        seconds=seconds,
        evaluations=evaluations,
    )


def write_losses(path: Path, losses: list[float]) -> None:
    """Write the loss of every step."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        rows = csv.writer(stream, lineterminator="\n")
        rows.writerow(["step", "loss"])
        rows.writerows((step, f"{loss:.5f}") for step, loss in enumerate(losses, start=1))


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--output", type=Path, default=HERE / "adapters" / "smollm2-json", help="where the adapter goes"
    )
    parser.add_argument("--base", type=Path, help="a local folder of the base [the packaged GGUF, imported once]")
    parser.add_argument("--seed", type=int, default=20261122)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8, help="examples a step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
