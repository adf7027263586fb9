"""Random images and sounds: shapes as configured, values in the processor's range, no two alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lora_deploy.evidence.architecture import Architecture
from lora_deploy.evidence.conventions import Conventions
from lora_deploy.evidence.forward import rows_of
from lora_deploy.evidence.image_tokens import image_tokens
from lora_deploy.evidence.probe import Probe, make_probes
from lora_deploy.evidence.stimulus import images, sounds


def architecture(main_input: str, *others: str, **fields: Any) -> Architecture:
    kinds = {"name": "", "is_decoder": False, "is_encoder_decoder": False} | fields
    return Architecture(main_input=main_input, arguments=frozenset({main_input, *others}), **kinds)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_images_are_scaled_as_the_processor_scales_them() -> None:
    scale = {"image_mean": [0.5, 0.25, 0.0], "image_std": [0.5, 0.25, 1.0]}
    found = images(Conventions(config={"image_size": 16}, images=scale), 4, generator())
    assert found.shape == (4, 3, 16, 16)
    limits = torch.tensor([[-1.0, 1.0], [-1.0, 3.0], [0.0, 1.0]])
    assert bool((found.amin(dim=(0, 2, 3)) >= limits[:, 0]).all())
    assert bool((found.amax(dim=(0, 2, 3)) <= limits[:, 1]).all())
    assert torch.cdist(found.flatten(1), found.flatten(1)).fill_diagonal_(9.0).min() > 1


@pytest.mark.parametrize(
    ("main_input", "config", "shape"),
    [
        ("input_features", {"num_mel_bins": 80, "max_source_positions": 10}, (2, 80, 20)),
        ("input_features", {"feature_projection_input_dim": 160}, (2, 100, 160)),
        ("input_values", {"num_mel_bins": 16, "max_length": 32}, (2, 32, 16)),
        ("input_values", {}, (2, 4000)),
    ],
)
def test_sounds_have_the_shape_that_the_model_hears(
    main_input: str, config: dict[str, Any], shape: tuple[int, ...]
) -> None:
    found = sounds(Conventions(config=config), architecture(main_input), 2, generator())
    assert found.shape == shape
    assert 0 < found.std() <= 1.1
    assert found.abs().max() < 6
    assert not found[0].equal(found[1])


def test_an_answer_begins_with_its_mark_and_is_padded_behind_where_the_model_takes_a_mask() -> None:
    config = {"vocab_size": 50, "decoder_start_token_id": 7, "max_position_embeddings": 64, "pad_token_id": 20}
    masked = architecture("input_ids", "decoder_input_ids", "decoder_attention_mask", is_encoder_decoder=True)
    *_, four = make_probes(config, masked)
    assert four.inputs["decoder_input_ids"][:, 0].tolist() == [7] * 4
    assert four.inputs["decoder_attention_mask"].sum(dim=1).tolist() == [12, 10, 8, 6]
    assert bool((four.inputs["decoder_input_ids"][four.inputs["decoder_attention_mask"] == 0] == 20).all())
    assert not bool((four.inputs["input_ids"][four.inputs["attention_mask"] == 1] == 20).any()), "no pad inside a text"
    *_, four = make_probes(config, architecture("input_ids", "decoder_input_ids", is_encoder_decoder=True))
    assert four.inputs["decoder_input_ids"].shape == (4, 6)
    assert "decoder_attention_mask" not in four.inputs


def test_classifiers_of_encoder_decoders_make_their_own_answer_of_a_text_that_ends_once() -> None:
    name = "BartForSequenceClassification"
    chosen = architecture("input_ids", "decoder_input_ids", is_encoder_decoder=True, name=name)
    for probe in make_probes({"vocab_size": 50, "eos_token_id": 9}, chosen):
        assert "decoder_input_ids" not in probe.inputs
        assert (probe.inputs["input_ids"] == 9).sum(dim=1).tolist() == [1] * len(probe.inputs["input_ids"])


def test_the_model_itself_says_how_many_tokens_an_image_is() -> None:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision, text = CLIPVisionConfig(image_size=12, patch_size=4, **sizes), LlamaConfig(vocab_size=37, **sizes)
    known = Conventions(config=LlavaConfig(text_config=text, vision_config=vision, image_token_index=3).to_dict())
    chosen = architecture("input_ids", "pixel_values", name="LlavaForConditionalGeneration", is_decoder=True)
    assert image_tokens(known, chosen) == (3,) * 9
    assert image_tokens(known, architecture("input_ids", name="LlamaForCausalLM")) == ()
    probes = make_probes(known.config, chosen)
    assert [len(p.inputs["pixel_values"]) for p in probes[:-1]] == [1, 1, 2, 4]
    assert "pixel_values" not in probes[-1].inputs
    assert all((p.inputs["input_ids"] == 3).sum(dim=1).tolist() == [9] * len(p.tokens) for p in probes[:-1])


@pytest.mark.parametrize(
    ("shape", "expected"), [((2, 5, 3), (10, 3)), ((2, 4, 3, 3), (18, 4)), ((2, 7), (2, 7)), ((2,), (2, 1))]
)
def test_frames_and_places_are_rows_of_their_own(shape: tuple[int, ...], expected: tuple[int, int]) -> None:
    value = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    rows = rows_of(Probe(name="p", inputs={}), value)
    assert rows.shape == expected
    if len(shape) == 4:
        assert rows[1].tolist() == value[0, :, 0, 1].tolist(), "channels stay together"
