"""What models are fed to compare them: seeded random inputs of the sizes that a configuration says.

Promise: the same configuration and seed give the same probes. Random tokens reach every part of a vocabulary, which
texts of one kind do not; padding is on the left for decoders, as generation pads, and on the right for encoders and for
the answers of encoder-decoders.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lora_deploy.evidence.architecture import Architecture
from lora_deploy.evidence.conventions import Conventions
from lora_deploy.evidence.image_tokens import image_tokens
from lora_deploy.evidence.stimulus import images, sounds

SEED = 20_261_125
SHORT, LONG = 5, 48
"""Tokens of the shortest and the longest random probe."""
N_NEW_TOKENS = 16
"""Tokens that greedy decoding adds to a probe of batch 1."""
_BATCH = 4
_BATCHES = (1, 2, _BATCH)
_SPECIAL_ROOM = 8
_LONGEST_ANSWER, _ANSWERS_STEP = 12, 2
"""Tokens of the longest answer in a padded batch, and how many fewer the next row has."""
_ANSWER = "decoder_input_ids"
_SPECIAL = ("pad_token_id", "eos_token_id", "image_token_id", "image_token_index")


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
        if _ANSWER in self.inputs:
            mask = self.inputs.get("decoder_attention_mask")
            return torch.ones_like(self.inputs[_ANSWER], dtype=torch.bool) if mask is None else mask.bool()
        mask = self.inputs.get("attention_mask")
        return None if mask is None else mask.bool()

    @property
    def tokens(self) -> Tensor:
        """(batch, sequence) int64: the text that is continued."""
        return self.inputs[_ANSWER if _ANSWER in self.inputs else "input_ids"]

    @property
    def description(self) -> str:
        """Shapes, for the report."""
        return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in self.inputs.items())

    def upto(self, stop: int) -> dict[str, Tensor]:
        """Inputs whose text ends before a position; everything else is whole."""
        return {name: value[:, :stop] if self._runs_with_text(name) else value for name, value in self.inputs.items()}

    def at(self, position: int) -> dict[str, Tensor]:
        """Inputs of one step: one token, its position, and the mask of everything up to it."""
        found = {}
        for name, value in self.inputs.items():
            if self._runs_with_text(name):
                found[name] = value[:, : position + 1] if "mask" in name else value[:, position : position + 1]
        return found

    def padded_right(self) -> Probe:
        """The same text with its padding moved behind it; real positions keep their order."""
        ids, mask = self.inputs["input_ids"], self.inputs["attention_mask"]
        order = mask.bool().int().argsort(dim=1, descending=True, stable=True)
        moved = {"input_ids": ids.gather(1, order), "attention_mask": mask.gather(1, order)}
        if "position_ids" in self.inputs:
            moved["position_ids"] = positions(moved["attention_mask"])
        return replace(self, inputs={**self.inputs, **moved})

    @property
    def padding(self) -> str:
        """``left`` or ``right``; empty where no row is padded."""
        mask = self.mask
        if mask is None or bool(mask.all()):
            return ""
        return "right" if bool(mask[:, 0].all()) else "left"

    def _runs_with_text(self, name: str) -> bool:
        if _ANSWER in self.inputs:
            return name.startswith("decoder_")
        return self.inputs[name].shape == self.inputs["input_ids"].shape


def make_probes(
    config: Mapping[str, Any],
    architecture: Architecture,
    seed: int = SEED,
    *,
    conventions: Conventions | None = None,
) -> tuple[Probe, ...]:
    """Make the probes of a model.

    For texts one short, one long, and four of unequal length in one padded batch; for images and sounds batches of one,
    two and four.

    Raises:
        InputError: The configuration does not say the sizes that its inputs have.
    """
    drawing = _Drawing(conventions or Conventions(config=config), architecture, seed)
    return tuple(drawing.texts() if drawing.reads_text else (drawing.single(n) for n in _BATCHES))


def make_workload(config: Mapping[str, Any], architecture: Architecture, n_rows: int, n_tokens: int) -> Probe:
    """Make one input of ``n_rows`` that times are taken with: ``n_tokens`` of text, fewer if so many have no place.

    Raises:
        InputError: As ``make_probes``.
    """
    drawing = _Drawing(Conventions(config=config), architecture, SEED)
    if not drawing.reads_text:
        return drawing.single(n_rows)
    return drawing.text("workload", [min(n_tokens, drawing.room)] * n_rows, answers=[1] * n_rows)


class _Drawing:
    """Draws inputs of one model, one after the other."""

    def __init__(self, conventions: Conventions, architecture: Architecture, seed: int) -> None:
        self._known, self._architecture = conventions, architecture
        self._generator = torch.Generator().manual_seed(seed)
        self._sees = {"input_ids", "pixel_values"} <= architecture.arguments and "vision_config" in conventions.config
        self.reads_text = architecture.main_input == "input_ids" or self._sees
        self._image_text: tuple[int, ...] = ()
        if self._sees and architecture.is_decoder:
            self._image_text = image_tokens(conventions, architecture)
            self._sees = bool(self._image_text) or architecture.main_input == "pixel_values"

    @property
    def room(self) -> int:
        """Tokens of text that have a place beside an image and the continuation."""
        wanted = self._known.n_positions - len(self._image_text)
        return max(1, wanted - (n_new_tokens(self._known) if self._architecture.is_decoder else 0))

    def texts(self) -> Iterator[Probe]:
        longest = min(LONG, self.room)
        short = min(SHORT, longest)
        yield self.text(f"{short} tokens", [short], answers=[short])
        yield self.text(f"{longest} tokens", [longest], answers=[2 * _LONGEST_ANSWER])
        if self._sees:
            yield self.text("2 padded rows", [longest, max(1, longest // 2)], answers=[_LONGEST_ANSWER] * 2)
        rows = [longest, max(1, longest * 2 // 3), max(1, longest // 3), short]
        answers = [_LONGEST_ANSWER - _ANSWERS_STEP * k for k in range(_BATCH)]
        yield self.text(f"{_BATCH} padded rows", rows, answers=answers)
        if self._image_text:
            self._sees, self._image_text = False, ()
            yield self.text(f"{short} tokens, no image", [short])

    def text(self, name: str, lengths: Sequence[int], answers: Sequence[int] = ()) -> Probe:
        """Draw rows of tokens, with an image for each where the model sees, and an answer where it gives one."""
        beginning = torch.tensor(self._image_text, dtype=torch.int64)
        rows = [torch.cat([beginning, self._ended(self._tokens(n))]) for n in lengths]
        extra = {"pixel_values": images(self._known, len(rows), self._generator)} if self._sees else {}
        return text_probe(name, rows, self._known, self._architecture, extra, self._answers(answers))

    def single(self, n: int) -> Probe:
        """Draw ``n`` images or sounds."""
        name = self._architecture.main_input
        if name == "pixel_values":
            title, value = f"images x{n}", images(self._known, n, self._generator)
        else:
            title, value = f"audio x{n}", sounds(self._known, self._architecture, n, self._generator)
        first = 2 * _LONGEST_ANSWER if n == 1 else _LONGEST_ANSWER
        answers = self._answers([first - _ANSWERS_STEP * k for k in range(n)])
        return with_answers(Probe(name=title, inputs={name: value}), answers, self._known, self._architecture)

    def _answers(self, lengths: Sequence[int]) -> list[Tensor]:
        if not self._architecture.answers:
            return []
        room = max(1, self._known.n_positions - n_new_tokens(self._known))
        start = torch.tensor([self._known.start])
        return [torch.cat([start, self._tokens(max(1, min(n, room)) - 1)]) for n in lengths]

    def _tokens(self, n: int) -> Tensor:
        """Draw tokens, leaving out marks, and the first few, which often are some, where there are enough."""
        n_tokens = self._known.size("vocab_size")
        first = _SPECIAL_ROOM if n_tokens > 4 * _SPECIAL_ROOM else 0
        special = {self._known.token(name) for name in _SPECIAL}
        plain = next(
            token for token in (*range(first, n_tokens), 0) if token not in special or n_tokens <= len(special)
        )
        ids = torch.randint(first, n_tokens, (n,), generator=self._generator)
        for token in special - {None}:
            ids[ids == token] = plain
        return ids

    def _ended(self, ids: Tensor) -> Tensor:
        """Put the end's mark where models look for it: CLIP's text tower, and classifiers of encoder-decoders."""
        looks_for_end = (self._sees and not self._architecture.is_decoder) or (
            self._architecture.is_encoder_decoder and not self._architecture.answers
        )
        end = self._known.token("eos_token_id") if looks_for_end else None
        return ids if end is None else torch.cat([ids[:-1], torch.tensor([end])])


def text_probe(
    name: str,
    rows: Sequence[Tensor],
    conventions: Conventions,
    architecture: Architecture,
    extra: Mapping[str, Tensor] | None = None,
    answers: Sequence[Tensor] = (),
) -> Probe:
    """Pad rows of tokens into one batch, with the mask and the positions that the model takes."""
    ids, mask = _padded(rows, conventions.padding, is_left=architecture.is_decoder)
    inputs = {"input_ids": ids, "attention_mask": mask, **(extra or {})}
    if architecture.is_decoder and "position_ids" in architecture.arguments:
        inputs["position_ids"] = positions(mask)
    is_greedy = architecture.is_decoder and len(rows) == 1
    probe = Probe(name=name, inputs=inputs, n_new_tokens=n_new_tokens(conventions) if is_greedy else 0)
    return with_answers(probe, answers, conventions, architecture)


def with_answers(
    probe: Probe, answers: Sequence[Tensor], conventions: Conventions, architecture: Architecture
) -> Probe:
    """Give the decoder of an encoder-decoder its text: rows of tokens, each from the token that answers start with.

    Rows are padded on the right where the model takes a mask for that; else all are as long as the shortest.
    """
    if not answers:
        return probe
    if "decoder_attention_mask" not in architecture.arguments:
        shortest = min(len(row) for row in answers)
        answers = [row[:shortest] for row in answers]
    ids, mask = _padded(answers, conventions.padding, is_left=False)
    inputs = {**probe.inputs, _ANSWER: ids}
    if not bool(mask.all()):
        inputs["decoder_attention_mask"] = mask
    is_greedy = architecture.answers and len(answers) == 1
    return replace(probe, inputs=inputs, n_new_tokens=n_new_tokens(conventions) if is_greedy else 0)


def _padded(rows: Sequence[Tensor], filler: int, *, is_left: bool) -> tuple[Tensor, Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), filler, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for k, row in enumerate(rows):
        place = slice(width - len(row), width) if is_left else slice(0, len(row))
        ids[k, place], mask[k, place] = row, 1
    return ids, mask


def n_new_tokens(conventions: Conventions) -> int:
    """How far a greedy continuation goes."""
    return min(N_NEW_TOKENS, conventions.n_positions // 2)


def positions(mask: Tensor) -> Tensor:
    """Count real tokens from 0, (batch, sequence); padding before them has position 0."""
    return (mask.long().cumsum(dim=-1) - 1).clamp(min=0)
