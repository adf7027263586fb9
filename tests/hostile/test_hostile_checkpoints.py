"""Bases that lie: every one is one clear error of the right class, and nothing outside the folder is opened."""

from __future__ import annotations

import json
import os
import pickle
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_deploy.bases import open_base
from lora_deploy.checkpoint import open_checkpoint
from lora_deploy.companions import companion_files
from lora_deploy.errors import InputError, MalformedCheckpointError, UnsafeFileError
from tests.builders import make_checkpoint

ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
TENSORS = {"a": torch.zeros(2, 3), "b": torch.ones(4)}


def raw_file(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def file_of(entries: Any, n_data_bytes: int = 8) -> bytes:
    return raw_file(json.dumps(entries).encode(), bytes(n_data_bytes))


LIES: dict[str, tuple[bytes, str]] = {
    "an empty file": (b"", "the file is empty"),
    "a few bytes": (b"\x01\x02\x03", "3 bytes are too few"),
    "an LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "is a git LFS pointer",
    ),
    "an HTML page": (b"<!DOCTYPE html><html><body>404</body></html>", "is an HTML page"),
    "an HTML page behind white space": (b"\n\n  <html></html>", "is an HTML page"),
    "a zip archive": (b"PK\x03\x04" + bytes(60), "not a safetensors file"),
    "a header of 2^63 bytes": (raw_file(b"{}", length=1 << 63), "header length 9223372036854775808"),
    "a header of 2^64-1 bytes": (raw_file(b"{}", length=(1 << 64) - 1), "header length 18446744073709551615"),
    "a header longer than the file": (raw_file(b"{}", length=1000), "truncated: the header needs 1008 bytes"),
    "a header that is no JSON": (raw_file(b"{{{{"), "header is not valid JSON"),
    "a header that is no UTF-8": (raw_file(b'{"\xff": 1}'), "header is not valid JSON"),
    "a header that is a list": (raw_file(b"[]"), "header is not a JSON object"),
    "a header nested a hundred thousand deep": (raw_file(b"[" * 100_000), "header is not valid JSON"),
    "a number with a million digits": (raw_file(b'{"a":' + b"9" * 1_000_000 + b"}"), "header is not valid JSON"),
    "the same name twice": (
        raw_file(b'{"a":' + json.dumps(ONE).encode() + b',"a":' + json.dumps(ONE).encode() + b"}", bytes(8)),
        "header names 'a' twice",
    ),
    "the same field twice": (
        raw_file(b'{"a":{"dtype":"F32","shape":[2],"shape":[9],"data_offsets":[0,8]}}', bytes(8)),
        "header names 'shape' twice",
    ),
    "metadata that is no map": (file_of({"__metadata__": [1], "a": ONE}), "__metadata__"),
    "metadata with numbers": (file_of({"__metadata__": {"a": 1}, "a": ONE}), "__metadata__"),
    "an unknown dtype": (file_of({"a": ONE | {"dtype": "F99"}}), "a: entry is malformed"),
    "an entry that is no map": (file_of({"a": 3}), "a: entry is malformed"),
    "no offsets": (file_of({"a": {"dtype": "F32", "shape": [2]}}), "a: entry is malformed"),
    "three offsets": (file_of({"a": ONE | {"data_offsets": [0, 4, 8]}}), "a: entry is malformed"),
    "a negative dimension": (file_of({"a": ONE | {"shape": [-2]}}), "are no sizes"),
    "a dimension that is a float": (file_of({"a": ONE | {"shape": [2.0]}}), "are no sizes"),
    "a dimension that is true": (file_of({"a": ONE | {"shape": [True, 2]}}), "are no sizes"),
    "a shape that overflows 64 bits": (file_of({"a": ONE | {"shape": [1 << 33, 1 << 33]}}), "needs"),
    "a shape whose overflow would fit": (file_of({"a": ONE | {"shape": [1 << 32, 1 << 32, 2]}}), "needs"),
    "a shape with a zero and an absurd size": (file_of({"a": ONE | {"shape": [0, 1 << 60]}}), "are no sizes"),
    "offsets that run backwards": (file_of({"a": ONE | {"data_offsets": [8, 0]}}), "hold -8 bytes"),
    "offsets beyond the file": (file_of({"a": ONE | {"shape": [4], "data_offsets": [0, 16]}}), "truncated"),
    "overlapping offsets": (file_of({"a": ONE, "b": ONE | {"data_offsets": [4, 12]}}, 12), "overlaps"),
    "the same range twice": (file_of({"a": ONE, "b": ONE}), "overlaps"),
    "a hole between tensors": (file_of({"a": ONE, "b": ONE | {"data_offsets": [12, 20]}}, 20), "leaves a hole"),
    "bytes that nobody owns": (file_of({"a": ONE}, 9), "bytes that no tensor owns"),
}


@pytest.mark.parametrize(("content", "message"), LIES.values(), ids=LIES)
def test_a_weights_file_that_lies_is_malformed(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(MalformedCheckpointError, match=message) as caught:
        open_base(str(tmp_path))
    assert caught.value.exit_code == 3
    assert len(caught.value.message.splitlines()) == 1


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, TENSORS, n_shards=2)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(MalformedCheckpointError, match=r"model-00002-of-00002\.safetensors: truncated"):
        open_base(str(tmp_path))


def rewrite_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


STALE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "names a tensor that is nowhere": (
        lambda index: index["weight_map"].update(c="model-00001-of-00002.safetensors"),
        "names 1 tensors",
    ),
    "names the wrong shard": (
        lambda index: index["weight_map"].update(a="model-00002-of-00002.safetensors"),
        "names 1 tensors",
    ),
    "names a shard that is not there": (
        lambda index: index["weight_map"].update(c="model-00003-of-00002.safetensors"),
        "no such file",
    ),
    "has no map": (lambda index: index.pop("weight_map"), "weight_map is not a map"),
    "has a list": (lambda index: index.update(weight_map=["a"]), "weight_map is not a map"),
    "has a number for a file": (lambda index: index["weight_map"].update(a=3), "weight_map is not a map"),
}


@pytest.mark.parametrize(("change", "message"), STALE.values(), ids=STALE)
def test_a_stale_index_is_malformed(tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    make_checkpoint(tmp_path, TENSORS, n_shards=2)
    rewrite_index(tmp_path, change)
    with pytest.raises(MalformedCheckpointError, match=message):
        open_base(str(tmp_path))


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/../../x", "..\\x", "a\0b"])
def test_an_index_that_names_a_file_outside_is_unsafe(tmp_path: Path, name: str) -> None:
    make_checkpoint(tmp_path / "base", TENSORS, n_shards=2)
    make_checkpoint(tmp_path, {"c": torch.zeros(1)})
    (tmp_path / "model.safetensors").rename(tmp_path / "outside.safetensors")
    rewrite_index(tmp_path / "base", lambda index: index["weight_map"].update(c=name))
    with pytest.raises(UnsafeFileError, match="leads out of the folder"):
        open_base(str(tmp_path / "base"))


@pytest.mark.parametrize("linked", ["model.safetensors", "config.json"])
def test_a_link_out_of_the_folder_is_unsafe(tmp_path: Path, linked: str) -> None:
    make_checkpoint(tmp_path / "elsewhere", TENSORS, {"model_type": "llama"})
    make_checkpoint(tmp_path / "base", TENSORS, {"model_type": "llama"})
    (tmp_path / "base" / linked).unlink()
    (tmp_path / "base" / linked).symlink_to(tmp_path / "elsewhere" / linked)
    with pytest.raises(UnsafeFileError, match="outside the folder"):
        open_base(str(tmp_path / "base"))


def test_a_tokenizer_that_is_a_link_out_of_the_folder_does_not_travel(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("hunter2")
    checkpoint = make_checkpoint(tmp_path / "base", TENSORS, {})
    (tmp_path / "base" / "tokenizer.json").symlink_to(secret)
    with pytest.raises(UnsafeFileError, match="outside the folder"):
        companion_files([], checkpoint)


def test_links_of_a_hub_cache_are_followed_into_its_blobs_and_nowhere_else(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--o--n" / "snapshots" / ("0" * 40)
    make_checkpoint(snapshot, TENSORS, {})
    blobs = tmp_path / "models--o--n" / "blobs"
    blobs.mkdir()
    for path in [*snapshot.iterdir()]:
        path.rename(blobs / path.name)
        path.symlink_to(Path("../../blobs") / path.name)
    assert set(open_base(str(snapshot)).tensors) == set(TENSORS)
    (snapshot / "model.safetensors").unlink()
    make_checkpoint(tmp_path / "elsewhere", TENSORS)
    (snapshot / "model.safetensors").symlink_to(tmp_path / "elsewhere" / "model.safetensors")
    with pytest.raises(UnsafeFileError, match="outside the folder"):
        open_base(str(snapshot))


def test_a_folder_in_place_of_a_file_is_no_weights_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(MalformedCheckpointError):
        open_base(str(tmp_path))


def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, TENSORS, n_shards=2)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(MalformedCheckpointError, match="no such file"):
        open_base(str(tmp_path))


def test_an_index_too_large_to_be_one_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "model.safetensors.index.json").open("wb") as stream:
        stream.truncate(1 << 40)  # a sparse file: a lie of a terabyte that takes no disk
    with pytest.raises(MalformedCheckpointError, match="1099511627776 bytes, at most"):
        open_base(str(tmp_path))


def test_a_header_that_claims_more_than_memory_takes_no_memory(tmp_path: Path) -> None:
    entries = {f"t{k}": {"dtype": "F64", "shape": [1 << 40], "data_offsets": [0, 1 << 43]} for k in range(20_000)}
    (tmp_path / "model.safetensors").write_bytes(file_of(entries))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(MalformedCheckpointError):
        open_base(str(tmp_path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kilobytes


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch pwned",)


@pytest.mark.parametrize("as_zip", [True, False])
def test_a_pickle_that_would_run_code_is_unsafe_and_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_zip: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    if as_zip:
        torch.save({"a": torch.zeros(1), "b": Bomb()}, path)
    else:
        path.write_bytes(pickle.dumps({"a": Bomb()}, protocol=2))
    with pytest.raises(UnsafeFileError, match="would run code"):
        open_base(str(tmp_path))
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"<html>", b"PK\x03\x04junk", b"\x80\x02."]
)
def test_a_pickled_base_that_is_none_is_malformed(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(InputError):
        open_base(str(tmp_path))


def test_a_pickled_index_that_names_a_file_outside_is_unsafe(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "outside.bin")
    base = tmp_path / "base"
    base.mkdir()
    (base / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "../outside.bin"}}))
    with pytest.raises(UnsafeFileError, match="leads out of the folder"):
        open_base(str(base))


def test_a_config_that_is_no_json_is_malformed(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, TENSORS)
    (tmp_path / "config.json").write_text("<html>")
    with pytest.raises(MalformedCheckpointError, match=r"config\.json: is not valid JSON"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("reference", ["/no/such/folder", "no-such-folder", "a/b/c", "../x", "owner/na me", ""])
def test_a_base_that_is_not_there_is_said_to_be_missing(reference: str) -> None:
    with pytest.raises(InputError, match=r"no such|no safetensors|nameless") as caught:
        open_base(reference)
    assert caught.value.hint
