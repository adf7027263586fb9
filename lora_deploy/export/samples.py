"""Inputs to trace a model with, at a chosen size: two sizes show which axes vary.

Promise: masks hold a 0, because an exporter drops a mask that is all ones, and padded batches could then never run.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lora_deploy.errors import ExportError

_PIXELS, _FEATURES, _AUDIO = "pixel_values", "input_features", "input_values"
_SAMPLES_A_TOKEN = 400
"""Of a wave: more than any feature extractor makes one frame of."""
_GRID = "image_grid_thw"
_IMAGE_TOKENS = ("image_token_id", "image_token_index")


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleSize:
    """How large a sample is."""

    n_rows: int
    """Batch."""
    n_tokens: int
    """Length of the text, and of the beginning of an answer."""


def sample_inputs(model: Any, size: SampleSize, *, is_left_padded: bool) -> dict[str, Any]:  # noqa: ANN401
    """Make inputs of a transformers model.

    Raises:
        ExportError: The model wants something that no sample is known for.
    """
    parameters = inspect.signature(model.forward).parameters
    if _GRID in parameters:
        raise ExportError(
            f"{type(model).__name__}: its images come as patches of a grid ({_GRID}), for which no sample is known",
            hint="export a text-only checkpoint of its language model",
        )
    inputs: dict[str, Any] = {}
    if _PIXELS in parameters:
        inputs[_PIXELS] = _pixels(model, size)
    if _FEATURES in parameters:
        inputs[_FEATURES] = _features(model.config, size)
    if _AUDIO in parameters:
        inputs[_AUDIO] = _sound(model.config, size)
    if "input_ids" in parameters:
        inputs |= _text(model.config, size, parameters, is_left_padded=is_left_padded)
    if has_image_tokens(model.config):
        inputs = _with_image_tokens(model, inputs)
    if not inputs:
        raise ExportError(f"{type(model).__name__}: no sample is known for its inputs {', '.join(parameters)}")
    return inputs


def _text(config: Any, size: SampleSize, parameters: Mapping[str, Any], *, is_left_padded: bool) -> dict[str, Any]:  # noqa: ANN401
    text = getattr(config, "text_config", None) or config
    n_words = int(getattr(text, "vocab_size", 0) or 0)
    if n_words < 4:
        raise ExportError(f"vocab_size: found {n_words}, expected the number of tokens")
    # Ids in the middle: the first and the last are special tokens that some models look for.
    ids = torch.randint(n_words // 4, max(n_words // 4 + 1, n_words - n_words // 4), (size.n_rows, size.n_tokens))
    mask = torch.ones_like(ids)
    mask[0, 0 if is_left_padded else -1] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "token_type_ids" in parameters and int(getattr(text, "type_vocab_size", 0) or 0) > 1:
        kinds = torch.zeros_like(ids)
        kinds[:, size.n_tokens // 2 :] = 1
        inputs["token_type_ids"] = kinds
    return {name: value for name, value in inputs.items() if name in parameters}


def has_image_tokens(config: Any) -> bool:  # noqa: ANN401
    """Whether a token of the text stands for a part of an image."""
    return any(isinstance(getattr(config, name, None), int) for name in _IMAGE_TOKENS)


def _with_image_tokens(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ANN401
    """Put the image's tokens behind the first of the text, as many as the model makes of an image."""
    if _PIXELS not in inputs or "input_ids" not in inputs:
        return dict(inputs)
    token = next(found for name in _IMAGE_TOKENS if isinstance(found := getattr(model.config, name, None), int))
    with torch.no_grad():
        found = model.get_image_features(pixel_values=inputs[_PIXELS][:1])
    features = getattr(found, "pooler_output", found)
    parts = features if isinstance(features, list | tuple) else [features]
    n_tokens = sum(part.shape[:-1].numel() for part in parts)
    filled = {"input_ids": token, "attention_mask": 1, "token_type_ids": 1, "mm_token_type_ids": 1}
    return {
        name: torch.cat([value[:, :1], value.new_full((len(value), n_tokens), filled[name]), value[:, 1:]], dim=1)
        if name in filled
        else value
        for name, value in inputs.items()
    }


def _pixels(model: Any, size: SampleSize) -> torch.Tensor:  # noqa: ANN401
    vision = getattr(model.config, "vision_config", None) or model.config
    edge = getattr(vision, "image_size", None)
    if edge is None:
        raise ExportError(f"{type(model).__name__}: image_size: the configuration does not say how large images are")
    height, width = edge if isinstance(edge, list | tuple) else (edge, edge)
    return torch.randn(size.n_rows, int(getattr(vision, "num_channels", 3)), int(height), int(width))


def _features(config: Any, size: SampleSize) -> torch.Tensor:  # noqa: ANN401
    if hasattr(config, "max_source_positions") and not hasattr(config, "input_feat_per_channel"):
        # Whisper's encoder halves the frames and has one position for each.
        return torch.randn(size.n_rows, int(config.num_mel_bins), 2 * int(config.max_source_positions))
    widths = ("feature_projection_input_dim", "input_feat_per_channel")
    width = next((int(getattr(config, name)) for name in widths if hasattr(config, name)), 80)
    return torch.randn(size.n_rows, 8 * size.n_tokens, width)


def _sound(config: Any, size: SampleSize) -> torch.Tensor:  # noqa: ANN401
    """A wave, or the spectrum of one of fixed length where the model takes that."""
    if hasattr(config, "num_mel_bins"):
        return torch.randn(size.n_rows, int(config.max_length), int(config.num_mel_bins))
    return torch.randn(size.n_rows, _SAMPLES_A_TOKEN * size.n_tokens)
