"""BASE as the user typed it: folders, files, indices, pickles, and what is none of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_deploy.artifact import cache_root
from lora_deploy.bases import open_base
from lora_deploy.errors import InputError, MalformedCheckpointError, RecipeError
from tests.builders import make_checkpoint

W = {"model.embed_tokens.weight": torch.randn(4, 2), "model.norm.weight": torch.ones(2)}


@pytest.mark.parametrize(
    "reference", ["", "model.safetensors.index.json"], ids=["the folder", "the index inside the folder"]
)
def test_a_sharded_folder_opens(tmp_path: Path, reference: str) -> None:
    make_checkpoint(tmp_path, W, {"model_type": "llama"}, n_shards=2)
    checkpoint = open_base(str(tmp_path / reference))
    assert set(checkpoint.tensors) == set(W)
    assert checkpoint.ref.name == str(tmp_path / reference)
    assert checkpoint.ref.revision is None


def test_a_lone_file_opens_with_the_config_beside_it(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, W, {"model_type": "llama"})
    save_file({"other": torch.zeros(1)}, tmp_path / "other.safetensors")
    assert set(open_base(str(tmp_path / "other.safetensors")).tensors) == {"other"}
    assert open_base(str(tmp_path / "other.safetensors")).config == {"model_type": "llama"}


def test_home_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    make_checkpoint(tmp_path / "base", W)
    assert set(open_base("~/base").tensors) == set(W)


def test_a_local_folder_wins_over_a_hub_id_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_checkpoint(tmp_path / "owner" / "name", W)
    assert open_base("owner/name").ref.revision is None


def test_an_adapter_given_as_base_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(MalformedCheckpointError, match="is an adapter, not a base"):
        open_base(str(tmp_path))


def test_a_gguf_file_needs_the_word_dequantize(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(60))
    for reference in (tmp_path / "model.gguf", tmp_path):
        with pytest.raises(RecipeError) as caught:
            open_base(str(reference))
        assert caught.value.hint == "--dequantize"


@pytest.mark.parametrize("name", ["model.onnx", "model.h5", "model"])
def test_a_file_of_another_kind_is_no_base(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InputError, match="is no base"):
        open_base(str(tmp_path / name))


def test_pickled_weights_are_converted_once_bit_by_bit(tmp_path: Path) -> None:
    tensors = {
        "transformer.wte.weight": torch.randn(4, 2).to(torch.bfloat16),
        "strided": torch.arange(12).reshape(3, 4).T,
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.empty(0, 3),
        "mask": torch.tensor([True, False]),
    }
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    (folder / "tokenizer.json").write_text("{}")
    torch.save(tensors, folder / "pytorch_model.bin")
    checkpoint = open_base(str(folder))
    assert checkpoint.ref.name == str(folder)
    assert checkpoint.root.is_relative_to(cache_root() / "bases")
    assert (checkpoint.root / "tokenizer.json").is_file()
    assert checkpoint.config == {"model_type": "gpt2"}
    for name, tensor in tensors.items():
        assert bytes(checkpoint.read(name)) == tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert checkpoint.tensors[name].shape == tuple(tensor.shape)
    before = (checkpoint.root / "model.safetensors").stat().st_mtime_ns
    assert open_base(str(folder)).root == checkpoint.root
    assert (checkpoint.root / "model.safetensors").stat().st_mtime_ns == before
    torch.save(tensors | {"scalar": torch.tensor(3.0)}, folder / "pytorch_model.bin")
    assert open_base(str(folder)).root != checkpoint.root


def test_pickled_shards_keep_their_files(tmp_path: Path) -> None:
    weight_map = {}
    for k, (name, tensor) in enumerate(W.items()):
        torch.save({name: tensor}, tmp_path / f"pytorch_model-{k}.bin")
        weight_map[name] = f"pytorch_model-{k}.bin"
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = open_base(str(tmp_path))
    assert len(checkpoint.files) == 2
    assert set(checkpoint.tensors) == set(W)


def test_a_tensor_in_two_pickled_shards_is_malformed(tmp_path: Path) -> None:
    for k in range(2):
        torch.save({"a": torch.zeros(2)}, tmp_path / f"pytorch_model-{k}.bin")
    index = {"weight_map": {"a": "pytorch_model-0.bin", "b": "pytorch_model-1.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(MalformedCheckpointError, match="a is in another file too"):
        open_base(str(tmp_path))


def test_a_head_that_shares_the_embeddings_storage_is_stored_once(tmp_path: Path) -> None:
    embedding = torch.randn(4, 2)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    torch.save(
        {"transformer.wte.weight": embedding, "lm_head.weight": embedding, "other": embedding},
        tmp_path / "pytorch_model.bin",
    )
    assert set(open_base(str(tmp_path)).tensors) == {"transformer.wte.weight", "other"}


def test_an_equal_head_with_storage_of_its_own_is_kept(tmp_path: Path) -> None:
    embedding = torch.randn(4, 2)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    torch.save(
        {"transformer.wte.weight": embedding, "lm_head.weight": embedding.clone()}, tmp_path / "pytorch_model.bin"
    )
    assert set(open_base(str(tmp_path)).tensors) == {"transformer.wte.weight", "lm_head.weight"}


def test_a_conversion_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2, dtype=torch.complex128)}, tmp_path / "model.pt")
    with pytest.raises(MalformedCheckpointError, match="complex128"):
        open_base(str(tmp_path / "model.pt"))
    assert {path.suffix for path in (cache_root() / "bases").glob("*")} == {".lock"}
