"""Seeded images and sounds as a processor would hand them to a model: large shapes with noise on them, in its range.

Promise: the shapes are those that the configuration says; two drawings differ at every place, so that no two items of
a batch look alike to a model.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from lora_deploy.evidence.architecture import Architecture
from lora_deploy.evidence.conventions import Conventions

SAMPLING_RATE = 16_000
"""Samples a second, as speech models have it."""
_N_SAMPLES = 8000
_N_PATCHES = 4
_NOISE = 0.25
_N_TONES = 5


def images(conventions: Conventions, n: int, generator: torch.Generator) -> Tensor:
    """Draw images, (n, channels, height, width) float32, scaled as the processor scales them.

    Raises:
        InputError: The configuration does not say their size.
    """
    channels, height, width = conventions.image_shape
    bright = _textured(n, channels, height, width, generator)
    mean, deviation = (torch.tensor(values).view(-1, 1, 1) for values in conventions.image_scale(channels))
    return (bright - mean) / deviation


def sounds(conventions: Conventions, architecture: Architecture, n: int, generator: torch.Generator) -> Tensor:
    """Draw what a model of sounds takes: waves (n, samples), or spectra (n, bins, frames) or (n, frames, bins).

    Raises:
        InputError: The configuration does not say how many frames or bins there are.
    """
    config = conventions.config
    if architecture.main_input == "input_features" and "max_source_positions" in config:
        # Whisper's encoder halves the frames and has one position for each.
        bins, frames = conventions.size("num_mel_bins"), 2 * conventions.size("max_source_positions")
        return 2 * _textured(n, 1, bins, frames, generator).squeeze(1) - 1
    widths = ("feature_projection_input_dim", "input_feat_per_channel", "num_mel_bins")
    width = next((name for name in widths if name in config), None)
    if architecture.main_input == "input_features" or width == "num_mel_bins":
        frames = conventions.size("max_length") if width == "num_mel_bins" else 100
        return 2 * _textured(n, 1, frames, conventions.size(width or widths[0]), generator).squeeze(1) - 1
    return _waves(n, generator)


def _textured(n: int, channels: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Draw brightness in [0..1]: a few large patches, blurred, and noise on them."""
    coarse = torch.rand(n, channels, min(_N_PATCHES, height), min(_N_PATCHES, width), generator=generator)
    smooth = interpolate(coarse, size=(height, width), mode="bilinear", align_corners=True)
    noise = torch.rand(n, channels, height, width, generator=generator)
    return (1 - _NOISE) * smooth + _NOISE * noise


def _waves(n: int, generator: torch.Generator) -> Tensor:
    """Draw a few tones and noise, each with mean 0 and deviation 1: half a second, less the more there are."""
    n_samples = _N_SAMPLES // n
    seconds = torch.arange(n_samples) / SAMPLING_RATE
    pitches = 80 + 3000 * torch.rand(n, _N_TONES, 1, generator=generator)
    tones = torch.sin(2 * torch.pi * pitches * seconds + 6 * torch.rand(n, _N_TONES, 1, generator=generator)).sum(dim=1)
    wave = tones + torch.randn(n, n_samples, generator=generator)
    return (wave - wave.mean(dim=1, keepdim=True)) / wave.std(dim=1, keepdim=True)
