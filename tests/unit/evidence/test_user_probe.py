"""The user's images, sounds and answers: read beside the probes file, by the folder's own processor, or refused."""

from __future__ import annotations

import json
import wave
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessor, Wav2Vec2FeatureExtractor

from lora_deploy.errors import InputError, UnsafeFileError
from lora_deploy.evidence.architecture import Architecture
from lora_deploy.evidence.conventions import Conventions
from lora_deploy.evidence.media_file import read_wave
from lora_deploy.evidence.probe import Probe
from lora_deploy.evidence.user_probe import read_probes


def architecture(main_input: str, *others: str, **fields: Any) -> Architecture:
    kinds = {"is_decoder": False, "is_encoder_decoder": False} | fields
    return Architecture(name="SomeModel", main_input=main_input, arguments=frozenset({main_input, *others}), **kinds)


TEXTS = architecture("input_ids")
PIXELS, WAVES = architecture("pixel_values"), architecture("input_values")
TRANSLATOR = architecture("input_ids", "decoder_input_ids", is_encoder_decoder=True)
HEARER = architecture("input_values", "decoder_input_ids", is_encoder_decoder=True)
TOWERS = architecture("input_ids", "pixel_values")
CONFIG = {"vocab_size": 100, "decoder_start_token_id": 7}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder with processors, and files that probes name beside it."""
    model = tmp_path / "model"
    Image.new("L", (30, 40), 128).save(tmp_path / "grey.png")
    sound(tmp_path / "tone.wav", rate=16_000)
    (tmp_path / "no.png").write_bytes(b"no image")
    model.mkdir()
    return model


def sound(path: Path, *, rate: int, width: int = 2, n_channels: int = 1, content: bytes = b"\0\x40" * 800) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(n_channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(content)
    return path


def read(folder: Path, entry: Any, chosen: Architecture, **config: Any) -> Probe:
    path = folder.parent / "probes.jsonl"
    path.write_text(json.dumps(entry))
    (found,) = read_probes(path, folder, Conventions.of({**CONFIG, **config}, folder), chosen)
    return found


def test_an_image_goes_through_the_folders_processor(folder: Path) -> None:
    ViTImageProcessor(size={"height": 8, "width": 6}, image_mean=[0.25] * 3, image_std=[0.5] * 3).save_pretrained(
        folder
    )
    probe = read(folder, {"image": "grey.png"}, PIXELS)
    assert probe.inputs["pixel_values"].shape == (1, 3, 8, 6)
    assert torch.allclose(probe.inputs["pixel_values"], torch.tensor((128 / 255 - 0.25) / 0.5), atol=1e-4)


def test_a_sound_goes_through_the_folders_extractor(folder: Path) -> None:
    Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(folder)
    probe = read(folder, {"audio": "tone.wav"}, WAVES)
    assert probe.inputs["input_values"].shape == (1, 800)
    assert torch.allclose(probe.inputs["input_values"], torch.tensor(0.5), atol=1e-4)
    assert read(folder, {"audio": "tone.wav"}, HEARER).inputs["decoder_input_ids"].tolist() == [[7]]


def test_an_encoder_decoder_reads_the_prompt_again_where_no_answer_is_given(folder: Path) -> None:
    probe = read(folder, {"input_ids": [10, 11, 12]}, TRANSLATOR)
    assert probe.inputs["input_ids"].tolist() == [[10, 11, 12]]
    assert probe.inputs["decoder_input_ids"].tolist() == [[7, 10, 11, 12]]
    assert probe.n_new_tokens


@pytest.mark.parametrize(("width", "content"), [(1, b"\x80\xc0"), (2, b"\0\0\0\x40"), (4, b"\0\0\0\0\0\0\0\x40")])
def test_samples_lie_between_minus_one_and_one_and_channels_are_averaged(
    tmp_path: Path, width: int, content: bytes
) -> None:
    sound(tmp_path / "stereo.wav", rate=8000, width=width, n_channels=2, content=content)
    samples, rate = read_wave(tmp_path, "stereo.wav", "here")
    assert samples.tolist() == [0.25]
    assert rate == 8000


@pytest.mark.parametrize(
    ("entry", "chosen", "complaint"),
    [
        ({"image": "grey.png"}, TEXTS, "takes input_ids, not images or sounds"),
        ({"prompt": "hello"}, PIXELS, "takes pixel_values, not texts"),
        ({"image": "grey.png"}, WAVES, "takes input_values, not texts"),
        ({"image": "none.png"}, PIXELS, "none.png: no such file"),
        ({"image": "no.png"}, PIXELS, "no.png: is no image"),
        ({"image": 3}, PIXELS, "found a JSON int, expected the name of a file"),
        ({"image": "grey.png"}, PIXELS, "need a processor, and .* has none that loads"),
        ({"audio": "grey.png"}, WAVES, "is no sound that can be read"),
        ({"audio": "tone.wav"}, WAVES, "need a processor"),
        ({"input_ids": [1], "answer": "yes"}, TEXTS, "has no decoder that would read it"),
        ({"input_ids": [1], "answer": 3}, TRANSLATOR, "answer: found a JSON int, expected a text"),
        ({"input_ids": [1], "answer": "yes"}, TRANSLATOR, "need a tokenizer"),
    ],
)
def test_what_cannot_be_used_is_named_by_its_line(
    folder: Path, entry: Any, chosen: Architecture, complaint: str
) -> None:
    with pytest.raises(InputError, match=f"probes.jsonl:1: .*{complaint}"):
        read(folder, entry, chosen)


@pytest.mark.parametrize("entry", [{"image": "grey.png"}, {"prompt": "a cat"}])
def test_a_model_that_compares_images_and_texts_wants_both(folder: Path, entry: Any) -> None:
    with pytest.raises(InputError, match="expected prompt and image"):
        read(folder, entry, TOWERS, vision_config={})


def test_another_sampling_rate_is_told_not_stretched(folder: Path) -> None:
    Wav2Vec2FeatureExtractor(sampling_rate=16_000).save_pretrained(folder)
    sound(folder.parent / "slow.wav", rate=8000)
    with pytest.raises(InputError, match="found 8000 samples a second, the model takes 16000"):
        read(folder, {"audio": "slow.wav"}, WAVES)


@pytest.mark.parametrize("name", ["../grey.png", "/etc/passwd", "link.png"])
def test_no_path_leads_out_of_the_probes_folder(folder: Path, name: str) -> None:
    (folder.parent / "link.png").symlink_to("/etc/passwd")
    with pytest.raises(UnsafeFileError, match=r"leads out|outside the folder"):
        read(folder, {"image": name}, PIXELS)
