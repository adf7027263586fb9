"""Tiny models that see: two towers that are compared, and language models that read what a vision model saw."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    IdeficsConfig,
    IdeficsForVisionText2Text,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SiglipConfig,
    SiglipForImageClassification,
    SiglipModel,
)

from tests.peer.models import VOCABULARY, images, token_ids
from tests.peer.trained import Inputs, randomize

IMAGE = 3
"""Token id that stands for a piece of an image."""
_SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
_TEXT: dict[str, Any] = {"vocab_size": VOCABULARY, **_SIZES}
_DECODER: dict[str, Any] = {**_TEXT, "num_key_value_heads": 1}
_VISION: dict[str, Any] = {"image_size": 8, "patch_size": 4, **_SIZES}
_TOWERS: dict[str, Any] = {"text_config": {**_TEXT, "max_position_embeddings": 16}, "vision_config": _VISION}


def clip_classifier() -> nn.Module:
    """The vision tower alone, below a head."""
    return randomize(CLIPForImageClassification(CLIPConfig(**_TOWERS, projection_dim=12, num_labels=3)))


def siglip() -> nn.Module:
    """Two towers; the vision tower ends in an attention with fused input projections."""
    text = {**_TOWERS["text_config"], "projection_size": 16}
    return randomize(SiglipModel(SiglipConfig(**{**_TOWERS, "text_config": text})))


def siglip_classifier() -> nn.Module:
    """The vision tower alone, below a head."""
    return randomize(SiglipForImageClassification(SiglipConfig(**_TOWERS, num_labels=3)))


_QWEN_TEXT = {**_DECODER, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
_QWEN_TOKENS = {"image_token_id": IMAGE, "vision_start_token_id": 4, "vision_end_token_id": 5, "video_token_id": 6}
_QWEN_PATCHES = {"depth": 2, "num_heads": 2, "patch_size": 2, "spatial_merge_size": 2, "temporal_patch_size": 2}


def qwen2_vl() -> nn.Module:
    """Every tensor has another name on disk than in memory; the text model's on disk are those of a text model."""
    vision = {**_QWEN_PATCHES, "embed_dim": 16, "hidden_size": 16, "mlp_ratio": 2}
    config = Qwen2VLConfig(text_config=_QWEN_TEXT, vision_config=vision, tie_word_embeddings=False, **_QWEN_TOKENS)
    return randomize(Qwen2VLForConditionalGeneration(config))


def qwen2_5_vl() -> nn.Module:
    """As Qwen2-VL, with windows of attention and gated layers in the vision model."""
    vision = {**_QWEN_PATCHES, "hidden_size": 16, "out_hidden_size": 16, "intermediate_size": 24}
    vision |= {"window_size": 8, "fullatt_block_indexes": [1]}
    config = Qwen2_5_VLConfig(text_config=_QWEN_TEXT, vision_config=vision, tie_word_embeddings=False, **_QWEN_TOKENS)
    return randomize(Qwen2_5_VLForConditionalGeneration(config))


def idefics() -> nn.Module:
    """Layers of cross-attention between a llama's own; tokens of its own in matrices beside the vocabulary's."""
    vision = {**_VISION, "embed_dim": 16}
    config = IdeficsConfig(
        **_TEXT, vision_config=vision, use_resampler=False, cross_layer_interval=1, additional_vocab_size=2
    )
    return randomize(IdeficsForVisionText2Text(config))


def idefics2() -> nn.Module:
    """A perceiver between the models: two pieces an image."""
    perceiver = {"hidden_size": 16, "resampler_n_latents": 2, "resampler_depth": 1, "resampler_n_heads": 2}
    perceiver |= {"resampler_head_dim": 8, "num_key_value_heads": 1}
    text = {"model_type": "mistral", **_DECODER}
    config = Idefics2Config(text_config=text, vision_config=_VISION, perceiver_config=perceiver, image_token_id=IMAGE)
    return randomize(Idefics2ForConditionalGeneration(config))


def idefics3() -> nn.Module:
    """Patches put together in fours: one piece an image."""
    text = {"model_type": "llama", **_DECODER}
    config = Idefics3Config(text_config=text, vision_config=_VISION, image_token_id=IMAGE, scale_factor=2)
    return randomize(Idefics3ForConditionalGeneration(config))


def gemma3() -> nn.Module:
    """Every tensor has another name on disk than in memory, and the head is tied."""
    config = Gemma3Config(
        text_config={**_DECODER, "head_dim": 8, "query_pre_attn_scalar": 8},
        vision_config=_VISION,
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=4,
        eoi_token_index=5,
    )
    return randomize(Gemma3ForConditionalGeneration(config))


def paligemma() -> nn.Module:
    """As Gemma 3, around a Gemma."""
    text = {"model_type": "gemma", **_DECODER, "head_dim": 8}
    vision = {"model_type": "siglip_vision_model", **_VISION}
    config = PaliGemmaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE, projection_dim=16)
    return randomize(PaliGemmaForConditionalGeneration(config))


def seen(n_pieces: int, *, several: bool = False, types: bool = False) -> Inputs:
    """Text with the pieces of an image in it; ``several``: images have an axis of their own; ``types``: marked."""
    tokens = token_ids()["input_ids"].clamp(min=7)
    tokens[:, 1 : 1 + n_pieces] = IMAGE
    pixels = images()["pixel_values"]
    marks = {"token_type_ids": (tokens == IMAGE).long()} if types else {}
    return {"input_ids": tokens, "pixel_values": pixels[:, None] if several else pixels, **marks}


def seen_by_qwen() -> Inputs:
    """Each image as 4 by 4 patches of 24 numbers, read as four pieces."""
    generator = torch.Generator().manual_seed(5)
    tokens = token_ids()["input_ids"].clamp(min=7)
    tokens[:, 0], tokens[:, 1:5], tokens[:, 5] = 4, IMAGE, 5
    return {
        "input_ids": tokens,
        "pixel_values": torch.randn(32, 24, generator=generator, dtype=torch.float64),
        "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]]),
        "mm_token_type_ids": (tokens == IMAGE).long(),
    }


def seen_by_idefics() -> Inputs:
    """An image beside the text, which every token may look at."""
    tokens = token_ids()["input_ids"]
    return {**seen(0, several=True), "input_ids": tokens, "image_attention_mask": torch.ones(*tokens.shape, 1).long()}


def text_and_images() -> Inputs:
    """Two texts and two images, to be compared."""
    tokens = token_ids()["input_ids"].clamp(min=6)
    tokens[:, -1] = 5
    return {"input_ids": tokens, **images()}
