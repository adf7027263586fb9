"""The safetensors byte layout: what the reference writer writes is read, what we write the reference reader reads."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_deploy.artifact import sha256_of
from lora_deploy.errors import MergeError
from lora_deploy.safetensors_file import format_header, read_header, write_file
from lora_deploy.tensors import DType, TensorSpec

SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
NAMES = st.text(st.characters(exclude_categories=("Cs",)), min_size=1).filter(lambda name: name != "__metadata__")


def specs_of(tensors: dict[str, tuple[DType, tuple[int, ...]]]) -> list[TensorSpec]:
    specs, start = [], 0
    for name, (dtype, shape) in tensors.items():
        stop = start + torch.Size(shape).numel() * dtype.n_bytes
        specs.append(TensorSpec(name=name, dtype=dtype, shape=shape, file="x.safetensors", start=start, stop=stop))
        start = stop
    return specs


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(NAMES, st.tuples(st.sampled_from(DType), SHAPES), min_size=1, max_size=4))
def test_a_header_that_was_formatted_reads_back(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, tuple[DType, tuple[int, ...]]]
) -> None:
    specs = specs_of(tensors)
    path = tmp_path_factory.mktemp("header") / "x.safetensors"
    header = format_header(specs, {"format": "pt"})
    path.write_bytes(header + bytes(specs[-1].stop))
    read = read_header(path)
    assert sorted(read.tensors.values(), key=lambda s: s.name) == sorted(specs, key=lambda s: s.name)
    assert read.metadata == {"format": "pt"}
    assert read.start == len(header)
    assert len(header) % 8 == 0


def test_files_of_the_reference_writer_are_read(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.tensor(1.5)}
    save_file(tensors, tmp_path / "x.safetensors", {"k": "v"})
    header = read_header(tmp_path / "x.safetensors", file="sub/x.safetensors")
    assert {name: (s.dtype, s.shape, s.file) for name, s in header.tensors.items()} == {
        "a": (DType.I64, (2, 3), "sub/x.safetensors"),
        "b": (DType.BF16, (2,), "sub/x.safetensors"),
        "c": (DType.F32, (), "sub/x.safetensors"),
    }
    assert header.metadata == {"k": "v"}


def test_the_reference_reader_reads_what_was_written(tmp_path: Path) -> None:
    values = torch.randn(3, 2)
    specs = specs_of({"a": (DType.F32, (3, 2)), "é": (DType.U8, (1,))})
    chunks = [memoryview(values.numpy().tobytes()[:10]), memoryview(values.numpy().tobytes()[10:]), memoryview(b"\x07")]
    artifact = write_file(tmp_path / "x.safetensors", format_header(specs, {"format": "pt"}), chunks, root=tmp_path)
    read = load_file(tmp_path / "x.safetensors")
    assert torch.equal(read["a"], values)
    assert read["é"].tolist() == [7]
    assert artifact.sha256 == sha256_of(tmp_path / "x.safetensors")
    assert artifact.n_bytes == (tmp_path / "x.safetensors").stat().st_size
    assert str(artifact.path) == "x.safetensors"
    with safe_open(tmp_path / "x.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_a_failure_while_writing_leaves_nothing_behind(tmp_path: Path) -> None:
    def chunks() -> object:
        yield memoryview(b"1234")
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        write_file(tmp_path / "x.safetensors", b"", chunks(), root=tmp_path)  # type: ignore[arg-type]
    assert [*tmp_path.iterdir()] == []


def test_a_failure_while_writing_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")

    def chunks() -> object:
        yield memoryview(b"1234")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_file(path, b"", chunks(), root=tmp_path)  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_a_merge_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(MergeError, match="cannot be written"):
        write_file(tmp_path / "x.safetensors", b"", [], root=tmp_path)


def test_a_folder_that_does_not_exist_is_a_merge_error(tmp_path: Path) -> None:
    with pytest.raises(MergeError, match="cannot be written"):
        write_file(tmp_path / "no" / "x.safetensors", b"", [], root=tmp_path)
