"""The user's own probes: texts, token ids, images and sounds, a JSON line each.

Promise: a line that cannot be used is an error with its number; files are looked for beside the probes file and nowhere
else. Prompts go through the folder's tokenizer, images and sounds through its processor.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_deploy.errors import InputError
from lora_deploy.evidence.architecture import Architecture
from lora_deploy.evidence.conventions import Conventions
from lora_deploy.evidence.forward import quiet_peers
from lora_deploy.evidence.media_file import read_image, read_wave
from lora_deploy.evidence.probe import Probe, n_new_tokens, positions, text_probe, with_answers

_MAX_TOKENS = 512
_SOUNDS = frozenset({"input_features", "input_values"})
_TEXTS = "prompt (a text) or input_ids (a list)"


def read_probes(path: Path, folder: Path, conventions: Conventions, architecture: Architecture) -> tuple[Probe, ...]:
    """Read the user's probes for the model in ``folder``.

    Raises:
        InputError: A line is none; the message has its number.
        UnsafeFileError: A file lies outside the folder of the probes.
    """
    reading = _Reading(path, folder, conventions, architecture)
    probes = tuple(reading.probe(number, entry) for number, entry in lines_of(path))
    if not probes:
        raise InputError(f"{path}: holds no probe", hint='a line is {"prompt": "…"} or {"input_ids": [1, 2]}')
    return probes


class _Reading:
    """Turns lines of one file into probes of one model."""

    def __init__(self, path: Path, folder: Path, conventions: Conventions, architecture: Architecture) -> None:
        self._path, self._folder = path, folder
        self._known, self._architecture = conventions, architecture
        self._parts: dict[str, Any] = {}

    def probe(self, number: int, entry: Mapping[str, Any]) -> Probe:
        where, name = f"{self._path}:{number}", f"{self._path.name}:{number}"
        arguments, main_input = (
            self._architecture.arguments | {self._architecture.main_input},
            self._architecture.main_input,
        )
        if "image" in entry and "pixel_values" in arguments:
            inputs = self._seen(entry, where)
        elif "audio" in entry and main_input in _SOUNDS:
            inputs = self._heard(entry, where)
        elif main_input == "input_ids" and not ({"image", "audio"} & set(entry)):
            return self._read(name, entry, where)
        else:
            wanted = {"pixel_values": "image", "input_ids": "prompt"}.get(main_input, "audio")
            raise InputError(
                f"{where}: found keys {sorted(entry)}, but {self._architecture.name} takes {main_input}, not "
                f"{'images or sounds' if main_input == 'input_ids' else 'texts'}",
                hint=f'a line is {{"{wanted}": "…"}}',
            )
        return self._fed(name, inputs, self._answer(entry, where, []))

    def _read(self, name: str, entry: Mapping[str, Any], where: str) -> Probe:
        if "vision_config" in self._known.config and not self._architecture.is_decoder:
            raise InputError(f"{where}: found keys {sorted(entry)}, expected prompt and image: the model compares them")
        ids = self._ids(entry, where)
        answers = self._answer(entry, where, ids)
        return text_probe(name, [torch.tensor(ids)], self._known, self._architecture, {}, answers)

    def _ids(self, entry: Mapping[str, Any], where: str) -> list[int]:
        if "input_ids" in entry:
            ids = entry["input_ids"]
        elif isinstance(entry.get("prompt"), str):
            ids = self._tokens(entry["prompt"], where)
        else:
            raise InputError(f"{where}: found keys {sorted(entry)}, expected {_TEXTS}")
        return _checked_ids(ids, where, self._known.size("vocab_size"))[: self._room]

    @property
    def _room(self) -> int:
        continues = self._architecture.is_decoder
        return max(1, min(_MAX_TOKENS, self._known.n_positions - (n_new_tokens(self._known) if continues else 0)))

    def _tokens(self, text: str, where: str) -> Any:  # noqa: ANN401 - what a tokenizer gives is checked
        return self._tokenizer(where)(text)["input_ids"]

    def _answer(self, entry: Mapping[str, Any], where: str, otherwise: list[int]) -> list[Tensor]:
        """Give an encoder-decoder's own text: the line's answer, else the prompt again."""
        if not self._architecture.answers:
            if "answer" in entry:
                raise InputError(f"{where}: answer: {self._architecture.name} has no decoder that would read it")
            return []
        text = entry.get("answer")
        if text is not None and not isinstance(text, str):
            raise InputError(f"{where}: answer: found a JSON {type(text).__name__}, expected a text")
        ids = (
            otherwise
            if text is None
            else _checked_ids(self._tokens(text, where), where, self._known.size("vocab_size"))
        )
        room = max(1, min(_MAX_TOKENS, self._known.n_positions - n_new_tokens(self._known)))
        return [torch.tensor([self._known.start, *ids][:room])]

    def _seen(self, entry: Mapping[str, Any], where: str) -> dict[str, Tensor]:
        image = read_image(self._path.parent, entry["image"], where)
        text = entry.get("prompt")
        if "vision_config" in self._known.config and not isinstance(text, str):
            raise InputError(f"{where}: found keys {sorted(entry)}, expected prompt and image: the model reads both")
        if isinstance(text, str):
            return self._processed(where, self._processor("AutoProcessor", where), images=image, text=text)
        return self._processed(where, self._processor("AutoImageProcessor", where), images=image)

    def _heard(self, entry: Mapping[str, Any], where: str) -> dict[str, Tensor]:
        wave, rate = read_wave(self._path.parent, entry["audio"], where)
        extractor = self._processor("AutoFeatureExtractor", where)
        wanted = getattr(extractor, "sampling_rate", rate)
        if rate != wanted:
            raise InputError(f"{where}: {entry['audio']}: found {rate} samples a second, the model takes {wanted}")
        return self._processed(where, extractor, raw_speech=wave.numpy(), sampling_rate=rate)

    def _processed(self, where: str, processor: Callable[..., Any], **given: Any) -> dict[str, Tensor]:  # noqa: ANN401
        try:
            found = dict(processor(**given, return_tensors="pt"))
        except Exception as error:  # whatever the processor's own code raises
            raise InputError(f"{where}: the processor does not take it: {type(error).__name__}: {error}") from error
        tensors = {k: v for k, v in found.items() if isinstance(v, Tensor) and k in self._architecture.arguments}
        return {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}

    def _fed(self, name: str, inputs: dict[str, Tensor], answers: list[Tensor]) -> Probe:
        continues = self._architecture.is_decoder and "input_ids" in inputs
        if "input_ids" in inputs:
            inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
        if continues and "position_ids" in self._architecture.arguments:
            inputs["position_ids"] = positions(inputs["attention_mask"])
        probe = Probe(name=name, inputs=inputs, n_new_tokens=n_new_tokens(self._known) if continues else 0)
        return with_answers(probe, answers, self._known, self._architecture)

    def _tokenizer(self, where: str) -> Any:  # noqa: ANN401 - of transformers, untyped
        return self._loaded("AutoTokenizer", where, "prompts need a tokenizer", "give input_ids instead")

    def _processor(self, name: str, where: str) -> Any:  # noqa: ANN401 - as above
        return self._loaded(name, where, "images and sounds need a processor", "copy the base's files there")

    def _loaded(self, name: str, where: str, need: str, hint: str) -> Any:  # noqa: ANN401 - as above
        """Load what belongs to the folder, once."""
        import transformers

        if name not in self._parts:
            try:
                with quiet_peers():
                    found = getattr(transformers, name).from_pretrained(str(self._folder), local_files_only=True)
            except Exception as error:  # whatever its own code raises
                problem = f"{where}: {need}, and {self._folder} has none that loads: {error}"
                raise InputError(problem, hint=hint) from error
            self._parts[name] = found
        return self._parts[name]


def lines_of(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read the lines of a probes file, with their numbers.

    Raises:
        InputError: The file cannot be read, or a line is no JSON object.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}:{number}: is not valid JSON: {error}") from error
        if not isinstance(entry, dict):
            raise InputError(f"{path}:{number}: found a JSON {type(entry).__name__}, expected an object")
        yield number, entry


def _checked_ids(ids: object, where: str, n_tokens: int) -> list[int]:
    if not isinstance(ids, list) or not ids or not all(type(token) is int for token in ids):
        raise InputError(f"{where}: input_ids: found {ids!r:.40}, expected a list of one or more integers")
    wrong = next((token for token in ids if not 0 <= token < n_tokens), None)
    if wrong is not None:
        raise InputError(f"{where}: input_ids: found {wrong}, expected 0 to {n_tokens - 1}")
    return ids
