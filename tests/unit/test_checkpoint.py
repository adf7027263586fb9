"""Checkpoints: what is found, mapped and refused when a folder of safetensors files is opened."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_deploy.checkpoint import has_weights, open_checkpoint, read_json
from lora_deploy.errors import MalformedCheckpointError
from tests.builders import make_checkpoint

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.weight": torch.ones(4, dtype=torch.bfloat16)}


@pytest.mark.parametrize("n_shards", [1, 2])
def test_bytes_of_a_tensor_are_those_that_were_saved(tmp_path: Path, n_shards: int) -> None:
    checkpoint = make_checkpoint(tmp_path, TENSORS, {"model_type": "x"}, n_shards)
    assert checkpoint.config == {"model_type": "x"}
    assert len(checkpoint.files) == n_shards
    for name, tensor in TENSORS.items():
        assert bytes(checkpoint.read(name)) == tensor.view(torch.uint8).numpy().tobytes()
    assert bytes(checkpoint.read("a.weight", 4, 12)) == TENSORS["a.weight"].reshape(-1)[1:3].numpy().tobytes()
    assert checkpoint.n_bytes == 24 + 8


def test_an_empty_tensor_has_no_bytes(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, {"a": torch.empty(0, 3)})
    assert checkpoint.read("a").nbytes == 0


def test_a_single_file_may_have_any_name(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "weights.safetensors")
    assert open_checkpoint(tmp_path).files == ("weights.safetensors",)


def test_the_conventional_name_wins_over_others(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    save_file({"c": torch.ones(1)}, tmp_path / "consolidated.safetensors")
    assert set(open_checkpoint(tmp_path).tensors) == set(TENSORS)


def test_several_files_without_index_are_ambiguous(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_file(TENSORS, tmp_path / f"{name}.safetensors")
    with pytest.raises(MalformedCheckpointError, match="2 safetensors files and no index"):
        open_checkpoint(tmp_path)


def test_a_complete_set_of_numbered_shards_needs_no_index(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, TENSORS, n_shards=2)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert set(open_checkpoint(tmp_path).tensors) == set(TENSORS)


def test_a_missing_shard_is_named_where_there_is_no_index(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, TENSORS, n_shards=2)
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(MalformedCheckpointError, match="shards 2 of 2 are missing"):
        open_checkpoint(tmp_path)


def test_an_index_of_another_stem_is_used_when_it_is_the_only_one(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, TENSORS, n_shards=2)
    (tmp_path / "model.safetensors.index.json").rename(tmp_path / "diffusion_pytorch_model.safetensors.index.json")
    assert set(open_checkpoint(tmp_path).tensors) == set(TENSORS)


def test_the_index_decides_which_copy_counts(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, tmp_path / "one.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "two.safetensors")
    index = {"weight_map": {"a": "two.safetensors", "b": "one.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert open_checkpoint(tmp_path).tensors["a"].file == "two.safetensors"


def test_a_tensor_in_two_files_without_an_index_is_an_error(tmp_path: Path) -> None:
    for k in (1, 2):
        save_file({"a": torch.zeros(2)}, tmp_path / f"model-0000{k}-of-00002.safetensors")
    with pytest.raises(MalformedCheckpointError, match="a is in both"):
        open_checkpoint(tmp_path)


def test_chosen_files_leave_the_others_alone(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, TENSORS, n_shards=2)
    (file,) = open_checkpoint(tmp_path, files=("model-00001-of-00002.safetensors",)).files
    assert file == "model-00001-of-00002.safetensors"


def test_a_file_that_shrinks_while_in_use_is_an_error_and_no_crash(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, TENSORS)
    with (tmp_path / "model.safetensors").open("r+b") as stream:
        stream.truncate(100)
    with pytest.raises(MalformedCheckpointError, match="changed while in use"):
        checkpoint.read("a.weight")


def test_a_file_that_vanishes_while_in_use_is_an_error(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "x", TENSORS)
    shutil.rmtree(tmp_path / "x")
    with pytest.raises(MalformedCheckpointError, match="cannot be mapped"):
        checkpoint.read("a.weight")


@pytest.mark.parametrize("content", ["", "[1]", "{", '"x"', "\xff"])
def test_json_that_is_no_object_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.json").write_text(content, encoding="latin-1")
    with pytest.raises(MalformedCheckpointError, match=r"x\.json"):
        read_json(tmp_path / "x.json")


def test_a_folder_with_an_index_only_claims_to_have_weights(tmp_path: Path) -> None:
    assert not has_weights(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert has_weights(tmp_path)


def test_a_header_that_was_not_padded_moves_no_byte(tmp_path: Path) -> None:
    values = torch.arange(6.0)
    header = json.dumps({"a": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}}).encode()
    header += b" " * (-len(header) % 4 + 1)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + values.numpy().tobytes())
    assert torch.equal(torch.frombuffer(open_checkpoint(tmp_path).read("a"), dtype=torch.float32), values)
