"""How a cache that holds nothing looks, and which probes a layout is made for."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from lora_deploy.evidence.graphs import GraphFolder

SESSION, SUBJECT = (importlib.import_module(f"lora_deploy.evidence.{name}") for name in ("session", "onnx_subject"))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (["batch", 3, "past", 64], [4, 3, 0, 64]),
        (["batch", "3", "past", "kv_cache_dim"], [4, 3, 0, 16]),
    ],
)
def test_an_empty_cache_has_no_positions_and_the_width_that_is_said_somewhere(
    shape: list[object], expected: list[int]
) -> None:
    assert SESSION._empty_shape(shape, 4, 16) == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"genai_config.json": {"model": {"decoder": {"head_size": 64}}}, "config.json": {"head_dim": 32}}, 64),
        ({"config.json": {"head_dim": 32, "hidden_size": 48, "num_attention_heads": 4}}, 32),
        ({"config.json": {"hidden_size": 48, "num_attention_heads": 4}}, 12),
        ({"config.json": {"hidden_size": 48}}, 0),
        ({}, 0),
    ],
)
def test_the_width_of_a_key_comes_from_the_configurations_beside_the_graph(
    files: dict[str, object], expected: int, tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert SESSION.head_size(tmp_path) == expected


def test_rows_of_genais_graphs_have_lengths_of_their_own(tmp_path: Path) -> None:
    folder = GraphFolder(root=tmp_path, prefill=tmp_path / "model.onnx", decode=tmp_path / "model.onnx")
    assert not SUBJECT.has_lengths_by_row(folder)
    (tmp_path / "genai_config.json").write_text("{}")
    assert SUBJECT.has_lengths_by_row(folder)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("past_key_values.3.value", ("3", "", "value")),
        ("present.0.encoder.key", ("0", "encoder", "key")),
        ("past_key_values.0.decoder.key", ("0", "", "key")),
        ("input.past_key_values.layers.1.keys", ("1", "", "key")),
        ("output.past_key_values.self_attention_cache.layers.2.values", ("2", "", "value")),
        ("past_key_values.cross_attention_cache.layers.2.keys", ("2", "encoder", "key")),
        ("past_key_cross_4", ("4", "encoder", "key")),
        ("past_key_values", None),
    ],
)
def test_a_caches_place_is_read_from_every_makers_names(name: str, place: tuple[str, str, str] | None) -> None:
    assert SESSION._place(name) == place
