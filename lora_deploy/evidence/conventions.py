"""What a model's files say about its inputs: sizes, special tokens, and the scale of images. Nothing is loaded.

Promise: what a file does not say has the value that most models of its kind have; a size that nothing says is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_deploy.checkpoint import read_json
from lora_deploy.errors import InputError

_POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions")
_NESTED = ("text_config", "llm_config", "decoder", "encoder")
_START = ("decoder_start_token_id", "bos_token_id", "pad_token_id")
_FILES = {"generation": "generation_config.json", "images": "preprocessor_config.json"}
_UNLIMITED = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Conventions:
    """What is known about a model's inputs."""

    config: Mapping[str, Any]
    """``config.json``."""
    generation: Mapping[str, Any] = field(default_factory=dict)
    """``generation_config.json``."""
    images: Mapping[str, Any] = field(default_factory=dict)
    """``preprocessor_config.json``."""

    @classmethod
    def of(cls, config: Mapping[str, Any], folder: Path) -> Conventions:
        """Read what lies beside a checkpoint.

        Raises:
            InputError: A file is not JSON.
        """
        found = {key: read_json(folder / name) for key, name in _FILES.items() if (folder / name).is_file()}
        return cls(config=config, **found)

    @property
    def text(self) -> Mapping[str, Any]:
        """The part of the configuration that says the vocabulary: its own, or a nested one."""
        nested = [self.config.get(key) for key in _NESTED]
        parts = (part for part in (self.config, *nested) if isinstance(part, Mapping))
        return next((part for part in parts if "vocab_size" in part), self.config)

    @property
    def vision(self) -> Mapping[str, Any]:
        """The part that says how large images are."""
        nested = (self.config.get(key) for key in ("vision_config", "encoder"))
        return next((part for part in nested if isinstance(part, Mapping)), self.config)

    def size(self, name: str) -> int:
        """Look a size up.

        Raises:
            InputError: It is not there.
        """
        found = self.config.get(name, self.text.get(name))
        if not isinstance(found, int) or found < 1:
            raise InputError(f"config.json: {name}: found {found!r}, expected a size")
        return found

    @property
    def n_positions(self) -> int:
        """Longest text."""
        for key in _POSITIONS:
            if isinstance(self.text.get(key), int):
                # RoBERTa's first positions are taken by padding
                return int(self.text[key]) - (2 if "roberta" in str(self.text.get("model_type")) else 0)
        return _UNLIMITED

    def token(self, *names: str) -> int | None:
        """Find a special token by the first of these names that says one of the vocabulary."""
        for name in names:
            for part in (self.config, self.text, self.generation):
                found = part.get(name)
                found = found[0] if isinstance(found, list) and found else found
                if isinstance(found, int) and 0 <= found < self.size("vocab_size"):
                    return found
        return None

    @property
    def padding(self) -> int:
        """Token that fills rows up."""
        return self.token("pad_token_id") or 0

    @property
    def start(self) -> int:
        """Token that a decoder's answer begins with."""
        return self.token(*_START) or 0

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width in pixels.

        Raises:
            InputError: The configuration does not say it.
        """
        size = self.vision.get("image_size")
        if isinstance(size, Mapping):
            size = [size.get("height"), size.get("width")]
        height, width = size if isinstance(size, list | tuple) else (size, size)
        if not (isinstance(height, int) and isinstance(width, int)):
            raise InputError(f"config.json: image_size: found {self.vision.get('image_size')!r}, expected pixels")
        return int(self.vision.get("num_channels", 3)), height, width

    def image_scale(self, n_channels: int) -> tuple[list[float], list[float]]:
        """Mean and deviation that the processor takes brightness [0..1] by, channel by channel."""
        scale = [self.images.get(name) for name in ("image_mean", "image_std")]
        mean, deviation = (
            [float(value) for value in found]
            if isinstance(found, list) and len(found) == n_channels
            else [0.5] * n_channels
            for found in scale
        )
        return mean, deviation
