"""Let an exported decoder answer: greedy decoding over its cache, token by token, so that a person can talk to it.

Promise: what is heard is what the exported graphs say; the cache stays where onnxruntime put it and is never copied.
This is for trying a model, not for serving one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_deploy.checkpoint import read_json
from lora_deploy.errors import ExportError
from lora_deploy.export.extras import require_genai, require_onnxruntime, require_transformers_exporters
from lora_deploy.export.record import ExportRecord, read_record
from lora_deploy.export.runtime import open_session

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a model said, and how quickly."""

    text: str
    n_prompt_tokens: int
    n_tokens: int
    prefill_s: float
    """From the prompt to the first token."""
    decode_s: float
    """All tokens after the first."""

    @property
    def tokens_per_s(self) -> float | None:
        """Rate of decoding, None for an answer of one token."""
        return (self.n_tokens - 1) / self.decode_s if self.n_tokens > 1 and self.decode_s else None


class Decoder:
    """The prefill and decode graphs of an export, and a cache between them."""

    def __init__(self, folder: Path, record: ExportRecord, n_threads: int | None = None) -> None:
        """Open both graphs.

        Raises:
            ExportError: The export is no decoder with a cache, or a graph cannot be opened.
        """
        if not {"prefill", "decode"} <= set(record.graphs) or "encoder" in record.graphs:
            raise ExportError(f"{folder}: has the graphs {', '.join(record.graphs)}, expected those of a decoder")
        provider = record.options["provider"]
        self._device = "cpu" if provider == "cpu" else "cuda"
        self._runtime = require_onnxruntime()
        self._sessions = {
            name: open_session(folder / record.graphs[name].file, provider, n_threads) for name in ("prefill", "decode")
        }
        self._inputs = {name: [p.name for p in session.get_inputs()] for name, session in self._sessions.items()}
        self._outputs = {name: [p.name for p in session.get_outputs()] for name, session in self._sessions.items()}

    def tokens(self, prompt: Sequence[int]) -> Iterator[int]:
        """Give the most likely next token, again and again; never stops by itself."""
        length = len(prompt)
        ids, positions = np.array([prompt], np.int64), np.arange(length, dtype=np.int64)[None]
        token, cache = self._run("prefill", ids, positions, {})
        while True:
            yield token
            ids, positions = np.array([[token]], np.int64), np.array([[length]], np.int64)
            length += 1
            token, cache = self._run("decode", ids, positions, cache)

    def _run(self, stage: str, ids: Any, positions: Any, cache: dict[str, Any]) -> tuple[int, dict[str, Any]]:  # noqa: ANN401
        session = self._sessions[stage]
        n_read = int(positions[0, -1]) + 1
        given = {"input_ids": ids, "position_ids": positions, "attention_mask": np.ones((1, n_read), np.int64)}
        binding = session.io_binding()
        for port in self._inputs[stage]:
            name = port.removeprefix("input.")
            if name in cache:
                binding.bind_ortvalue_input(port, cache[name])
            else:
                binding.bind_cpu_input(port, given[name])
        names = self._outputs[stage]
        for name in names:
            binding.bind_output(name, self._device if name != "logits" else "cpu")
        session.run_with_iobinding(binding)
        outputs = dict(zip((name.removeprefix("output.") for name in names), binding.get_outputs(), strict=True))
        logits = outputs.pop("logits").numpy()
        return int(logits[0, -1].argmax()), outputs


def answer(
    folder: Path,
    prompt: str,
    *,
    max_tokens: int,
    is_raw: bool = False,
    say: Callable[[str], None] | None = None,
) -> Answer:
    """Answer a prompt; ``say`` hears the text as it comes, ``is_raw`` leaves the tokenizer's chat template out.

    Raises:
        InputError: The folder is no export.
        ExportError: It is no decoder, or has no tokenizer.
    """
    record = read_record(folder)
    tokenizer = _tokenizer(folder)
    ids = _prompt_ids(tokenizer, prompt, is_raw=is_raw)
    tokens = greedy_tokens(folder, record, ids, len(ids) + max_tokens)
    ends = _end_tokens(folder)
    told, found, times = "", [], [time.monotonic()]
    for token in tokens:
        times.append(time.monotonic())
        if token in ends:
            break
        found.append(token)
        text = str(tokenizer.decode(found, skip_special_tokens=True))
        if not text.endswith(_UNFINISHED):  # half a character is told with its other half
            if say is not None:
                say(text[len(told) :])
            told = text
        if len(found) >= max_tokens:
            break
    return Answer(
        text=str(tokenizer.decode(found, skip_special_tokens=True)),
        n_prompt_tokens=len(ids),
        n_tokens=len(times) - 1,
        prefill_s=times[1] - times[0],
        decode_s=times[-1] - times[1],
    )


def greedy_tokens(folder: Path, record: ExportRecord, prompt: Sequence[int], max_length: int) -> Iterator[int]:
    """Give the most likely next token, again and again, by whichever runtime the export is laid out for.

    ``max_length`` counts the prompt's tokens, too; not every layout stops there by itself.

    Raises:
        ExportError: The export is no decoder, or its runtime is missing or refuses it.
    """
    if record.options["layout"] != "genai":
        return Decoder(folder, record).tokens(prompt)
    genai = require_genai()
    try:
        model = genai.Model(str(folder))
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=max_length, do_sample=False)
        return _generated(genai.Generator(model, parameters), prompt)
    except Exception as error:  # its own errors are of no class of their own
        raise ExportError(f"{folder}: onnxruntime-genai refuses it: {' '.join(str(error).split())[:500]}") from error


def _generated(generator: Any, prompt: Sequence[int]) -> Iterator[int]:  # noqa: ANN401 - of onnxruntime-genai
    generator.append_tokens(list(prompt))
    while not generator.is_done():
        generator.generate_next_token()
        yield int(generator.get_next_tokens()[0])


def _tokenizer(folder: Path) -> Any:  # noqa: ANN401 - a tokenizer of transformers
    require_transformers_exporters()
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever transformers finds wrong
        raise ExportError(f"{folder}: has no tokenizer that transformers can load: {error}") from error


def _prompt_ids(tokenizer: Any, prompt: str, *, is_raw: bool) -> list[int]:  # noqa: ANN401
    if is_raw or not getattr(tokenizer, "chat_template", None):
        return [int(token) for token in tokenizer(prompt)["input_ids"]]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )
    return [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]


def _end_tokens(folder: Path) -> frozenset[int]:
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            ends = read_json(folder / name).get("eos_token_id")
            if ends is not None:
                return frozenset(ends if isinstance(ends, list) else [ends])
    return frozenset()
