"""What models are fed to compare them: seeded random inputs made from a configuration, and the user's own.

Promise: the same configuration and seed give the same probes. Random tokens reach every part of a vocabulary, which
texts of one kind do not; padding is on the left for decoders, as generation pads, and on the right for encoders.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_deploy.errors import InputError
from lora_deploy.evidence.architecture import Architecture

SEED = 20_261_125
SHORT, LONG = 5, 48
"""Tokens of the shortest and the longest random probe."""
N_NEW_TOKENS = 16
"""Tokens that greedy decoding adds to a probe of batch 1."""
_BATCH = 4
_SPECIAL_ROOM = 8
_MAX_USER_TOKENS = 512


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Probe:
    """Inputs of one forward pass."""

    name: str
    inputs: Mapping[str, Tensor]
    """By argument name: integers (batch, sequence), images (batch, channels, height, width) float32 …"""
    n_new_tokens: int = 0
    """How far greedy decoding goes from here; 0: not at all."""

    @property
    def mask(self) -> Tensor | None:
        """(batch, sequence) bool: which output positions are real; None where outputs have no such axis."""
        if "decoder_input_ids" in self.inputs:
            return torch.ones_like(self.inputs["decoder_input_ids"], dtype=torch.bool)
        mask = self.inputs.get("attention_mask")
        return None if mask is None else mask.bool()

    @property
    def description(self) -> str:
        """Shapes, for the report."""
        return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in self.inputs.items())


def make_probes(config: Mapping[str, Any], architecture: Architecture, seed: int = SEED) -> tuple[Probe, ...]:
    """Make the probes of a model: one short, one long, and four of unequal length in one padded batch.

    Raises:
        InputError: The configuration does not say the sizes that its inputs have.
    """
    generator = torch.Generator().manual_seed(seed)
    if architecture.main_input == "pixel_values":
        return tuple(
            Probe(name=f"images x{n}", inputs={"pixel_values": _images(config, n, generator)}) for n in (1, _BATCH)
        )
    if architecture.main_input in {"input_features", "input_values"}:
        return tuple(_speech(config, architecture, n, generator) for n in (1, 2))
    longest = _longest(config, architecture, LONG)
    short = min(SHORT, longest)
    rows = {
        f"{short} tokens": [short],
        f"{longest} tokens": [longest],
        f"{_BATCH} padded rows": [longest, max(1, longest * 2 // 3), max(1, longest // 3), min(longest, SHORT)],
    }
    probes = []
    for name, lengths in rows.items():
        ids = [_tokens(config, n, generator) for n in lengths]
        extra: dict[str, Tensor] = {}
        if "pixel_values" in architecture.arguments and "vision_config" in config and not architecture.is_decoder:
            extra = {"pixel_values": _images(config["vision_config"], len(ids), generator)}
        probes.append(_text_probe(name, ids, config, architecture, extra))
    return tuple(probes)


def _text_probe(
    name: str,
    rows: Sequence[Tensor],
    config: Mapping[str, Any],
    architecture: Architecture,
    extra: Mapping[str, Tensor] | None = None,
) -> Probe:
    """Pad rows of tokens into one batch, with the mask and the positions that the model takes."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), _pad_token(config), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for k, row in enumerate(rows):
        place = slice(width - len(row), width) if architecture.is_decoder else slice(0, len(row))
        ids[k, place], mask[k, place] = row, 1
    inputs = {"input_ids": ids, "attention_mask": mask, **(extra or {})}
    if architecture.is_decoder and "position_ids" in architecture.arguments:
        inputs["position_ids"] = positions(mask)
    if architecture.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(1) if mask.all() else ids[:, : max(1, width // 2)]
    is_greedy = architecture.is_decoder and len(rows) == 1
    return Probe(name=name, inputs=inputs, n_new_tokens=_n_new_tokens(config) if is_greedy else 0)


def _n_new_tokens(config: Mapping[str, Any]) -> int:
    return min(N_NEW_TOKENS, _n_positions(config) // 2)


def _longest(config: Mapping[str, Any], architecture: Architecture, wanted: int) -> int:
    """Leave room for the continuation where there is one."""
    room = _n_positions(config) - (_n_new_tokens(config) if architecture.is_decoder else 0)
    return max(1, min(wanted, room))


def positions(mask: Tensor) -> Tensor:
    """Count real tokens from 0, (batch, sequence); padding before them has position 0."""
    return (mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def _speech(config: Mapping[str, Any], architecture: Architecture, n: int, generator: torch.Generator) -> Probe:
    if architecture.main_input == "input_values":
        return Probe(name=f"audio x{n}", inputs={"input_values": torch.randn(n, 8000, generator=generator)})
    n_frames = 2 * _size(config, "max_source_positions")
    features = torch.randn(n, _size(config, "num_mel_bins"), n_frames, generator=generator)
    tokens = torch.stack([_tokens(config, SHORT, generator) for _ in range(n)])
    return Probe(name=f"audio x{n}", inputs={"input_features": features, "decoder_input_ids": tokens})


def _images(config: Mapping[str, Any], n: int, generator: torch.Generator) -> Tensor:
    size = config.get("image_size")
    if isinstance(size, Mapping):
        size = [size.get("height"), size.get("width")]
    height, width = size if isinstance(size, list | tuple) else (size, size)
    if not (isinstance(height, int) and isinstance(width, int)):
        raise InputError(f"config.json: image_size: found {config.get('image_size')!r}, expected pixels")
    return torch.randn(n, int(config.get("num_channels", 3)), height, width, generator=generator)


def _tokens(config: Mapping[str, Any], n: int, generator: torch.Generator) -> Tensor:
    """Draw tokens, leaving out the first few, which are often padding and marks, where there are enough."""
    n_tokens = _size(config, "vocab_size")
    first = _SPECIAL_ROOM if n_tokens > 4 * _SPECIAL_ROOM else 0
    return torch.randint(first, n_tokens, (n,), generator=generator)


def _pad_token(config: Mapping[str, Any]) -> int:
    found = config.get("pad_token_id", _text_config(config).get("pad_token_id"))
    return found if isinstance(found, int) and 0 <= found < _size(config, "vocab_size") else 0


def _n_positions(config: Mapping[str, Any]) -> int:
    text = _text_config(config)
    for key in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"):
        if isinstance(text.get(key), int):
            # RoBERTa's first positions are taken by padding
            return int(text[key]) - (2 if "roberta" in str(text.get("model_type")) else 0)
    return 1 << 20


def _size(config: Mapping[str, Any], name: str) -> int:
    found = config.get(name, _text_config(config).get(name))
    if not isinstance(found, int) or found < 1:
        raise InputError(f"config.json: {name}: found {found!r}, expected a size")
    return found


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a configuration that says the vocabulary: its own, or a nested one."""
    nested = [config.get(key) for key in ("text_config", "llm_config", "decoder", "encoder")]
    return next((part for part in (config, *nested) if isinstance(part, Mapping) and "vocab_size" in part), config)


def read_probes(path: Path, folder: Path, config: Mapping[str, Any], architecture: Architecture) -> tuple[Probe, ...]:
    """Read the user's probes: a line is ``{"prompt": "…"}``, for the folder's tokenizer, or ``{"input_ids": […]}``.

    Raises:
        InputError: A line is neither; the message has its number.
    """
    if architecture.main_input != "input_ids":
        raise InputError(f"{path}: {architecture.name} takes {architecture.main_input}, not texts")
    tokenize: list[Any] = []  # loaded when the first prompt comes
    probes = []
    for number, entry in _lines(path):
        where = f"{path}:{number}"
        if "input_ids" in entry:
            ids = _checked_ids(entry["input_ids"], where, _size(config, "vocab_size"))
        elif isinstance(entry.get("prompt"), str):
            if not tokenize:
                tokenize.append(_tokenizer(folder, where))
            ids = _checked_ids(tokenize[0](entry["prompt"])["input_ids"], where, _size(config, "vocab_size"))
        else:
            raise InputError(f"{where}: found keys {sorted(entry)}, expected prompt (a text) or input_ids (a list)")
        row = torch.tensor(ids[: _longest(config, architecture, _MAX_USER_TOKENS)])
        probes.append(_text_probe(f"{path.name}:{number}", [row], config, architecture))
    if not probes:
        raise InputError(f"{path}: holds no probe", hint='a line is {"prompt": "…"} or {"input_ids": [1, 2]}')
    return tuple(probes)


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
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


def _tokenizer(folder: Path, where: str) -> Any:  # noqa: ANN401 - of transformers, untyped
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # whatever the tokenizer's own code raises
        raise InputError(
            f"{where}: prompts need a tokenizer, and {folder} has none that loads: {error}",
            hint="give input_ids instead",
        ) from error
