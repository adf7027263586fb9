"""Probes: the same for the same seed, padded as each kind of model wants, and the user's own by line number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_deploy.errors import InputError
from lora_deploy.evidence.architecture import Architecture
from lora_deploy.evidence.conventions import Conventions
from lora_deploy.evidence.probe import make_probes, positions
from lora_deploy.evidence.user_probe import read_probes

CONFIG = {"vocab_size": 1000, "pad_token_id": 3, "max_position_embeddings": 2048}
KNOWN = Conventions(config=CONFIG)


def architecture(main_input: str = "input_ids", **fields: Any) -> Architecture:
    defaults: dict[str, Any] = {
        "name": "SomeForCausalLM",
        "arguments": frozenset({"input_ids", "position_ids"}),
        "is_decoder": True,
        "is_encoder_decoder": False,
    }
    return Architecture(main_input=main_input, **(defaults | fields))


def test_the_same_seed_gives_the_same_probes_and_another_one_others() -> None:
    first, again, other = (make_probes(CONFIG, architecture(), seed) for seed in (1, 1, 2))
    for one, two, three in zip(first, again, other, strict=True):
        assert torch.equal(one.inputs["input_ids"], two.inputs["input_ids"])
        assert not torch.equal(one.inputs["input_ids"], three.inputs["input_ids"])


def test_decoders_are_padded_on_the_left_and_count_positions_from_the_first_real_token() -> None:
    probe = make_probes(CONFIG, architecture())[-1]
    mask, ids = probe.inputs["attention_mask"], probe.inputs["input_ids"]
    assert mask.shape == (4, 48)
    assert mask.sum(dim=1).tolist() == [48, 32, 16, 5]
    assert bool((mask.diff(dim=1) >= 0).all())
    assert bool((ids[mask == 0] == 3).all())
    assert torch.equal(probe.inputs["position_ids"], positions(mask))
    assert probe.inputs["position_ids"][3, -5:].tolist() == [0, 1, 2, 3, 4]


def test_encoders_are_padded_on_the_right_and_continue_nothing() -> None:
    probes = make_probes(CONFIG, architecture(is_decoder=False))
    assert bool((probes[-1].inputs["attention_mask"].diff(dim=1) <= 0).all())
    assert "position_ids" not in probes[-1].inputs
    assert all(probe.n_new_tokens == 0 for probe in probes)


@pytest.mark.parametrize("n_positions", [4, 16, 40])
def test_a_continuation_fits_the_models_positions(n_positions: int) -> None:
    for probe in make_probes(CONFIG | {"max_position_embeddings": n_positions}, architecture()):
        assert probe.inputs["input_ids"].shape[1] + probe.n_new_tokens <= n_positions


@pytest.mark.parametrize("n_tokens", [5, 1000])
def test_tokens_are_of_the_vocabulary(n_tokens: int) -> None:
    for probe in make_probes(CONFIG | {"vocab_size": n_tokens}, architecture()):
        assert int(probe.inputs["input_ids"].min()) >= 0
        assert int(probe.inputs["input_ids"].max()) < n_tokens


@pytest.mark.parametrize("size", [8, [8, 6], {"height": 8, "width": 6}])
def test_images_have_the_configured_size(size: Any) -> None:
    probes = make_probes({"image_size": size, "num_channels": 1}, architecture("pixel_values", is_decoder=False))
    width = 8 if size == 8 else 6
    assert [tuple(probe.inputs["pixel_values"].shape) for probe in probes] == [(n, 1, 8, width) for n in (1, 2, 4)]


def test_a_configuration_without_sizes_is_an_error_that_names_the_key() -> None:
    with pytest.raises(InputError, match=r"config.json: vocab_size: found None"):
        make_probes({}, architecture())
    with pytest.raises(InputError, match="image_size"):
        make_probes({}, architecture("pixel_values", is_decoder=False))


# ----------------------------------------------------------------------------------------------------- the user's own


def written(folder: Path, *lines: Any) -> Path:
    path = folder / "probes.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_token_ids_are_read_and_empty_lines_are_not_counted_as_probes(tmp_path: Path) -> None:
    path = written(tmp_path, {"input_ids": [1, 2, 3]}, "", {"input_ids": [4]})
    first, second = read_probes(path, tmp_path, KNOWN, architecture())
    assert first.inputs["input_ids"].tolist() == [[1, 2, 3]]
    assert (first.name, second.name) == ("probes.jsonl:1", "probes.jsonl:3")
    assert first.n_new_tokens


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "is not valid JSON"),
        ("[1]", "found a JSON list, expected an object"),
        ({"text": "x"}, r"found keys \['text'\], expected prompt"),
        ({"prompt": 3}, "expected prompt"),
        ({"input_ids": []}, "expected a list of one or more integers"),
        ({"input_ids": [1, 2.5]}, "expected a list"),
        ({"input_ids": [True]}, "expected a list"),
        ({"input_ids": [1, 1000]}, "found 1000, expected 0 to 999"),
        ({"input_ids": [-1]}, "found -1"),
        ({"prompt": "hello"}, "prompts need a tokenizer"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, line: Any, complaint: str) -> None:
    path = written(tmp_path, {"input_ids": [1]}, "", line)
    with pytest.raises(InputError, match=f"probes.jsonl:3: .*{complaint}"):
        read_probes(path, tmp_path, KNOWN, architecture())


def test_a_file_that_is_not_there_or_empty_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_probes(tmp_path / "none", tmp_path, KNOWN, architecture())
    with pytest.raises(InputError, match="holds no probe"):
        read_probes(written(tmp_path, ""), tmp_path, KNOWN, architecture())
    with pytest.raises(InputError, match="takes pixel_values, not texts"):
        read_probes(written(tmp_path, {"input_ids": [1]}), tmp_path, KNOWN, architecture("pixel_values"))
