"""Images and sounds that a user's probes name: files beside the probes, read without running anything of theirs.

Promise: no path leads out of the folder; what is no image or no plain wave is an error that says where it was named.
"""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_deploy.checkpoint import contained_path
from lora_deploy.errors import InputError, MalformedCheckpointError
from lora_deploy.evidence.architecture import missing_packages

_MAX_PIXELS = 64_000_000
_MAX_SAMPLES = 64_000_000
_FORMATS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
"""Of a wave file's samples, by bytes."""


def read_image(folder: Path, name: object, where: str) -> Any:  # noqa: ANN401 - an image of pillow
    """Read an image, in red, green and blue.

    Raises:
        InputError: It is no image, or pillow is not installed.
        UnsafeFileError: The name leads out of the folder.
    """
    path = _beside(folder, name, where)
    if missing_packages("PIL"):
        raise InputError(f"{where}: images need pillow, which is not installed", hint="pip install pillow")
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise InputError(f"{where}: {name}: {image.width} x {image.height} pixels, at most 64 million are read")
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"{where}: {name}: is no image that can be read: {error}") from error


def read_wave(folder: Path, name: object, where: str) -> tuple[Tensor, int]:
    """Read a sound: samples in [-1, 1], (samples,) float32, the mean of its channels; and how many there are a second.

    Raises:
        InputError: It is no wave file of whole numbers.
        UnsafeFileError: The name leads out of the folder.
    """
    path = _beside(folder, name, where)
    try:
        with wave.open(str(path), "rb") as file:
            width, n_channels, rate, n_samples = (
                file.getsampwidth(), file.getnchannels(), file.getframerate(), file.getnframes()
            )  # fmt: skip
            if width not in _FORMATS or not 0 < n_samples * n_channels <= _MAX_SAMPLES:
                raise InputError(
                    f"{where}: {name}: found {n_samples} samples of {8 * width} bits, "
                    "expected one or more of 8, 16 or 32 bits"
                )
            content = bytearray(file.readframes(n_samples))
    except (OSError, EOFError, wave.Error) as error:
        raise InputError(
            f"{where}: {name}: is no sound that can be read: {error}", hint="convert it to a PCM .wav file"
        ) from error
    samples = torch.frombuffer(content, dtype=_FORMATS[width]).float()
    samples = (samples - 128) / 128 if width == 1 else samples / 2 ** (8 * width - 1)
    return samples.view(-1, n_channels).mean(dim=1), rate


def _beside(folder: Path, name: object, where: str) -> Path:
    if not isinstance(name, str):
        raise InputError(f"{where}: found a JSON {type(name).__name__}, expected the name of a file")
    try:
        return contained_path(folder, name)
    except MalformedCheckpointError as error:
        raise InputError(f"{where}: {folder / name}: no such file") from error
