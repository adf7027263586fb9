"""One decoder in this process, on one thread: time and processor time of a prompt and of the tokens after it, as JSON.

    decode_tokens.py RUNNER FOLDER [--prompt 64] [--tokens 64] [--repeats 3]

RUNNER is ``genai`` (onnxruntime-genai, its layout), ``ours`` (``lora-deploy try``) or ``torch`` (transformers'
``generate``, eager, float32). Decoding is greedy; nothing stops it before the last token.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

Tokens = Callable[[Sequence[int], int], Iterator[int]]
"""Prompt and number of tokens to say: the tokens."""
_SEED = 7


def main() -> None:
    """Open the decoder, run it once to warm up, then as often as asked; medians are printed."""
    options = _options()
    tokens = _RUNNERS[options.runner](options.folder)
    config = json.loads((options.folder / "config.json").read_text())
    prompt = random.Random(_SEED).choices(range(10, int(config["vocab_size"])), k=options.prompt)
    runs = [_timed(tokens, prompt, options.tokens) for _ in range(options.repeats + 1)][1:]
    figures = {name: statistics.median(run[name] for run in runs) for name in runs[0] if name != "tokens"}
    print(json.dumps({**figures, "tokens": runs[-1]["tokens"]}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runner", choices=_RUNNERS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


def _timed(tokens: Tokens, prompt: Sequence[int], n_tokens: int) -> dict[str, Any]:
    """Seconds until the first token, and for those after it."""
    clocks = [_clocks()]
    said = []
    for token in islice(tokens(prompt, n_tokens), n_tokens):
        said.append(token)
        clocks.append(_clocks())
    (start, start_cpu), (first, first_cpu), (last, last_cpu) = clocks[0], clocks[1], clocks[-1]
    rest = len(said) - 1
    return {
        "prefill_tokens_per_s": len(prompt) / (first - start),
        "prefill_tokens_per_cpu_s": len(prompt) / (first_cpu - start_cpu),
        "decode_tokens_per_s": rest / (last - first),
        "decode_tokens_per_cpu_s": rest / (last_cpu - first_cpu),
        "tokens": said,
    }


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _genai(folder: Path) -> Tokens:
    import onnxruntime_genai as genai

    config = genai.Config(str(folder))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": 1}}}}))
    model = genai.Model(config)

    def tokens(prompt: Sequence[int], n_tokens: int) -> Iterator[int]:
        length = len(prompt) + n_tokens
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(list(prompt))
        while not generator.is_done():
            generator.generate_next_token()
            yield int(generator.get_next_tokens()[0])

    return tokens


def _ours(folder: Path) -> Tokens:
    from lora_deploy.export.generate import Decoder
    from lora_deploy.export.record import read_record

    decoder = Decoder(folder, read_record(folder), n_threads=1)
    return lambda prompt, _: decoder.tokens(prompt)


def _torch(folder: Path) -> Tokens:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def tokens(prompt: Sequence[int], n_tokens: int) -> Iterator[int]:
        ids, cache = torch.tensor([prompt]), None
        for _ in range(n_tokens):  # what ``generate`` does, without its bookkeeping
            with torch.inference_mode():
                out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, token = out.past_key_values, int(out.logits[0, -1].argmax())
            yield token
            ids = torch.tensor([[token]])

    return tokens


_RUNNERS: dict[str, Callable[[Path], Tokens]] = {"genai": _genai, "ours": _ours, "torch": _torch}

if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
