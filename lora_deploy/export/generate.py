"""Let an exported model answer: greedy decoding over its cache, token by token, so that a person can talk to it.

Promise: what is heard is what the exported graphs say; the cache stays where onnxruntime put it and is never copied.
This is for trying a model, not for serving one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_deploy.checkpoint import read_json
from lora_deploy.errors import ExportError, LoraDeployError
from lora_deploy.export.adapter_file import read_values
from lora_deploy.export.extras import require_genai, require_transformers_exporters
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
    """The prefill and decode graphs of an export, and a cache between them; an encoder before them, if there is one."""

    def __init__(
        self, folder: Path, record: ExportRecord, n_threads: int | None = None, *, adapter: Path | None = None
    ) -> None:
        """Open the graphs, and an adapter's file for their inputs.

        Raises:
            ExportError: The export is no decoder with a cache, reads no text, or a graph cannot be opened.
        """
        if not {"prefill", "decode"} <= set(record.graphs):
            raise ExportError(f"{folder}: has the graphs {', '.join(record.graphs)}, expected those of a decoder")
        _require_text(folder, record)
        provider = record.options["provider"]
        self._device = "cpu" if provider == "cpu" else "cuda"
        self._start = _start_token(folder) if "encoder" in record.graphs else None
        """Token that an encoder-decoder's answer begins with; None where the answer continues the prompt."""
        names: list[str] = [name for name in ("encoder", "prefill", "decode") if name in record.graphs]
        self._sessions = {name: open_session(folder / record.graphs[name].file, provider, n_threads) for name in names}
        self._inputs = {name: [p.name for p in session.get_inputs()] for name, session in self._sessions.items()}
        self._outputs = {name: [p.name for p in session.get_outputs()] for name, session in self._sessions.items()}
        self._factors = read_values(adapter) if adapter is not None else {}

    def tokens(self, prompt: Sequence[int]) -> Iterator[int]:
        """Give the most likely next token, again and again; never stops by itself."""
        context, beginning = self._encoded(prompt)
        length = len(beginning)
        outputs = self._run("prefill", context | self._step(beginning, 0))
        cache: dict[str, Any] = {}
        while True:
            token = int(outputs.pop("logits").numpy()[0, -1].argmax())
            yield token
            cache |= outputs
            outputs = self._run("decode", context | cache | self._step([token], length))
            length += 1

    def _encoded(self, prompt: Sequence[int]) -> tuple[dict[str, Any], Sequence[int]]:
        """Run the encoder, where there is one: what every step reads besides its token, and the first tokens."""
        if self._start is None:
            return {}, prompt
        mask = np.ones((1, len(prompt)), np.int64)
        encoded = self._run("encoder", {"input_ids": np.array([prompt], np.int64), "attention_mask": mask})
        return {f"encoder_outputs.{name}": value for name, value in encoded.items()} | {"attention_mask": mask}, [
            self._start
        ]

    def _step(self, tokens: Sequence[int], n_before: int) -> dict[str, Any]:
        ids, length = np.array([tokens], np.int64), n_before + len(tokens)
        if self._start is not None:
            return {"decoder_input_ids": ids}
        places, mask = np.arange(n_before, length, dtype=np.int64)[None], np.ones((1, length), np.int64)
        return {"input_ids": ids, "position_ids": places, "attention_mask": mask}

    def _run(self, stage: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """Run one graph; what it gives stays where it is, but for logits."""
        session = self._sessions[stage]
        binding = session.io_binding()
        for name in self._inputs[stage]:
            value = given[_plain(name)]
            bind = binding.bind_cpu_input if isinstance(value, np.ndarray) else binding.bind_ortvalue_input
            bind(name, value)
        for name, values in self._factors.items():  # a session with bound inputs ignores active adapters
            binding.bind_ortvalue_input(name, values)
        names = self._outputs[stage]
        for name in names:
            binding.bind_output(name, self._device if name != "logits" else "cpu")
        session.run_with_iobinding(binding)
        return dict(zip(map(_plain, names), binding.get_outputs(), strict=True))


def _require_text(folder: Path, record: ExportRecord) -> None:
    first = record.graphs.get("encoder") or record.graphs.get("prefill")
    wanted = [] if first is None else [_plain(port.name) for port in first.inputs]
    if first is not None and "input_ids" not in wanted:
        raise ExportError(
            f"{folder}: {first.file} reads {', '.join(wanted)}, not text: it takes no prompt",
            hint="verify --probes compares it on images and sounds of yours",
        )


def _plain(name: str) -> str:
    """Name an input or output as the model does."""
    return name.removeprefix("input.").removeprefix("output.")


def _start_token(folder: Path) -> int:
    for name in ("generation_config.json", "config.json"):
        found = read_json(folder / name).get("decoder_start_token_id") if (folder / name).is_file() else None
        if isinstance(found, int):
            return found
    raise ExportError(f"{folder}: config.json names no decoder_start_token_id, which answers begin with")


def answer(
    folder: Path,
    prompt: str,
    *,
    max_tokens: int,
    is_raw: bool = False,
    adapter: str | None = None,
    say: Callable[[str], None] | None = None,
) -> Answer:
    """Answer a prompt; ``say`` hears the text as it comes, ``is_raw`` leaves the tokenizer's chat template out.

    ``adapter`` is one that a multi-lora export has under this name.

    Raises:
        InputError: The folder is no export.
        ExportError: It is no decoder, reads no text, or has no tokenizer.
    """
    record = read_record(folder)
    _require_text(folder, record)
    tokenizer = _tokenizer(folder)
    ids = _prompt_ids(tokenizer, prompt, is_raw=is_raw)
    file = _adapter_file(folder, record, adapter) if adapter is not None else None
    tokens = greedy_tokens(folder, record, ids, len(ids) + max_tokens, adapter=file)
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


def greedy_tokens(
    folder: Path, record: ExportRecord, prompt: Sequence[int], max_length: int, *, adapter: Path | None = None
) -> Iterator[int]:
    """Give the most likely next token, again and again, by whichever runtime the export is laid out for.

    ``max_length`` counts the prompt's tokens, too; not every layout stops there by itself. ``adapter`` is a file for
    the inputs that a multi-lora export has.

    Raises:
        ExportError: The export is no decoder, or its runtime is missing or refuses it.
    """
    if record.options["layout"] != "genai":
        return Decoder(folder, record, adapter=adapter).tokens(prompt)
    try:
        return _generated(_opened(folder, max_length, adapter), prompt)
    except LoraDeployError:
        raise
    except Exception as error:  # its own errors are of no class of their own
        raise ExportError(f"{folder}: onnxruntime-genai refuses it: {' '.join(str(error).split())[:500]}") from error


def _opened(folder: Path, max_length: int, adapter: Path | None) -> tuple[Any, Any]:
    """A generator of onnxruntime-genai, and the adapters that must live as long as it does."""
    genai = require_genai()
    model = genai.Model(str(folder))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=max_length, do_sample=False)
    generator, adapters = genai.Generator(model, parameters), genai.Adapters(model)
    if adapter is not None:
        adapters.load(str(adapter), adapter.stem)
        generator.set_active_adapter(adapters, adapter.stem)
    return generator, adapters


def _generated(opened: tuple[Any, Any], prompt: Sequence[int]) -> Iterator[int]:
    generator, _ = opened
    generator.append_tokens(list(prompt))
    while not generator.is_done():
        generator.generate_next_token()
        yield int(generator.get_next_tokens()[0])


def _adapter_file(folder: Path, record: ExportRecord, name: str) -> Path:
    known = record.multi_lora.adapters if record.multi_lora is not None else {}
    if name not in known:
        raise ExportError(f"{folder}: has no adapter {name}; it has {', '.join(known) or 'none'}")
    return folder / known[name].file


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
