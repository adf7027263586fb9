"""Finding, opening and refusing adapter files."""

import json
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_deploy.adapters.interface import ReadOptions
from lora_deploy.adapters.open import open_adapter, read_adapter
from lora_deploy.artifact import sha256_of
from lora_deploy.errors import (
    AmbiguousAdapterFormatError,
    InputError,
    LoraDeployError,
    MalformedAdapterError,
    UnknownAdapterFormatError,
    UnmergeableAdapterError,
    UnsafeFileError,
)
from tests.builders import save_peft

FACTORS = {
    "base_model.model.q.lora_A.weight": torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]),
    "base_model.model.q.lora_B.weight": torch.tensor([[1.0, 0.0], [0.0, 2.0]]),
}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:6c88\nsize 874\n"
PAGE = b"<!DOCTYPE html><html><body>Entry not found</body></html>"


class RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return (eval, ("__import__('pathlib').Path('ran').touch()",))


# ------------------------------------------------------------------------------------------------------------- finding


def test_a_folder_a_weights_file_and_a_bin_give_the_same_update(tmp_path: Path) -> None:
    folder = save_peft(tmp_path / "mine", FACTORS, {})
    other = tmp_path / "old"
    other.mkdir()
    torch.save(FACTORS, other / "adapter_model.bin")
    (other / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    deltas = []
    for path in (folder, folder / "adapter_model.safetensors", other):
        adapter = read_adapter(path, ReadOptions())
        update: Any = adapter.updates[0].update
        deltas.append(update.delta())
        assert adapter.updates[0].target == "q.weight"
        assert adapter.sha256 == sha256_of(adapter.path)
        assert adapter.config_sha256 == sha256_of(
            path / "adapter_config.json" if path.is_dir() else path.parent / "adapter_config.json"
        )
    expected = 2.0 * torch.tensor([[1.0, 2.0, 3.0], [8.0, 10.0, 12.0]], dtype=torch.float64)
    assert all(torch.equal(delta, expected) for delta in deltas)


def test_an_adapter_is_named_after_its_folder_its_file_or_its_repository(tmp_path: Path) -> None:
    folder = save_peft(tmp_path / "mine", FACTORS, {})
    assert open_adapter(folder).name == open_adapter(folder / "adapter_model.safetensors").name == "mine"
    save_file(FACTORS, tmp_path / "style.v2.safetensors")
    assert open_adapter(tmp_path / "style.v2.safetensors").name == "style.v2"
    snapshot = save_peft(tmp_path / "hub/models--owner--poet/snapshots/0123", FACTORS, {})
    assert open_adapter(snapshot).name == "poet"
    assert open_adapter(save_peft(snapshot / "epoch-2", FACTORS, {})).name == "poet-epoch-2"


def test_an_adapter_that_peft_saved_under_another_name_is_in_its_subfolder(tmp_path: Path) -> None:
    save_peft(tmp_path / "speech", FACTORS, {})
    with pytest.raises(MalformedAdapterError) as caught:
        read_adapter(tmp_path, ReadOptions())
    assert "--adapter-name" in str(caught.value.hint)
    assert "speech" in str(caught.value.hint)
    assert read_adapter(tmp_path, ReadOptions(adapter_name="speech")).name == "speech"


def test_several_weight_files_without_the_usual_name_ask_for_a_choice(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        save_file(FACTORS, tmp_path / name)
    (tmp_path / "training_args.bin").write_bytes(b"x")
    with pytest.raises(AmbiguousAdapterFormatError, match=r"a\.safetensors, b\.safetensors$"):
        open_adapter(tmp_path)
    (tmp_path / "b.safetensors").unlink()
    assert open_adapter(tmp_path).path.name == "a.safetensors"


def test_nothing_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        open_adapter(tmp_path / "missing")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(MalformedAdapterError, match="no weights, expected adapter_model"):
        open_adapter(tmp_path)
    with pytest.raises(MalformedAdapterError, match="is a configuration, not weights"):
        open_adapter(tmp_path / "adapter_config.json")


# --------------------------------------------------------------------------------------------------------------- links


def test_the_links_of_a_hub_cache_are_followed_and_links_out_of_a_folder_are_not(tmp_path: Path) -> None:
    cache = tmp_path / "models--owner--poet"
    real = save_peft(cache / "blobs", FACTORS, {})
    for snapshot in (cache / "snapshots/0123", cache / "snapshots/0123/epoch-2"):
        snapshot.mkdir(parents=True)
        for file in real.iterdir():
            (snapshot / file.name).symlink_to(file)
        assert len(read_adapter(snapshot, ReadOptions()).updates) == 1
    outside = tmp_path / "downloads"
    outside.mkdir()
    for file in real.iterdir():
        (outside / file.name).symlink_to(file)
    with pytest.raises(UnsafeFileError, match="outside the folder"):
        read_adapter(outside, ReadOptions())


def test_a_configuration_that_is_a_link_out_of_the_folder_is_not_read(tmp_path: Path) -> None:
    folder = save_peft(tmp_path / "mine", FACTORS, {})
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_config.json").symlink_to(secret)
    with pytest.raises(UnsafeFileError, match="outside the folder"):
        open_adapter(folder)
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_config.json").symlink_to(tmp_path / "gone.json")
    with pytest.raises(MalformedAdapterError, match="no such file"):
        open_adapter(folder)


# ------------------------------------------------------------------------------------------------------- not the thing


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"", "the file is empty"), (POINTER, "is a git LFS pointer"), (PAGE, "is an HTML page")],
    ids=["empty", "pointer", "page"],
)
def test_what_lies_in_place_of_weights_is_named(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MalformedAdapterError, match=problem):
        open_adapter(tmp_path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'{"peft_type": None}', "not valid JSON"),
        (b"", "the file is empty"),
        (POINTER, "is a git LFS pointer"),
        (PAGE, "is an HTML page"),
        (b"[1, 2]", "found a JSON list, expected an object"),
        (b'{"r": ' + b"[" * 100_000, "not valid JSON"),
    ],
    ids=["python", "empty", "pointer", "page", "list", "deep"],
)
def test_a_configuration_that_is_none_is_named(tmp_path: Path, content: bytes, problem: str) -> None:
    folder = save_peft(tmp_path, FACTORS, {})
    (folder / "adapter_config.json").write_bytes(content)
    with pytest.raises(MalformedAdapterError, match=problem):
        open_adapter(folder)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    for name, whole in (("a.safetensors", _safetensors(tmp_path)), ("b.bin", _bin(tmp_path))):
        (tmp_path / name).write_bytes(whole[: len(whole) - 40])
        with pytest.raises(MalformedAdapterError, match=r"truncated|not a readable torch file"):
            open_adapter(tmp_path / name)


def test_bytes_that_are_no_torch_file_are_malformed_not_unsafe(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"\x00\x01 these are no weights at all")
    with pytest.raises(MalformedAdapterError, match="not a readable torch file"):
        open_adapter(tmp_path / "a.bin")


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_would_run_code_is_unsafe_and_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: int
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.bin").write_bytes(pickle.dumps({"q.lora_A.weight": RunsCode()}, protocol=protocol))
    torch.save({"q.lora_A.weight": RunsCode()}, tmp_path / "b.pt")
    for name in ("a.bin", "b.pt"):
        with pytest.raises(UnsafeFileError, match="would run code"):
            open_adapter(tmp_path / name)
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------------------------------------- what pickles may hold


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_a_state_dict_one_level_down_is_found(tmp_path: Path, key: str) -> None:
    torch.save({key: FACTORS, "epoch": 3}, tmp_path / "a.ckpt")
    assert set(open_adapter(tmp_path / "a.ckpt").tensors) == set(FACTORS)


def test_an_old_torch_file_and_parameters_are_read(tmp_path: Path) -> None:
    parameters = {key: torch.nn.Parameter(tensor) for key, tensor in FACTORS.items()}
    torch.save(parameters, tmp_path / "a.bin", _use_new_zipfile_serialization=False)
    tensors = open_adapter(tmp_path / "a.bin").tensors
    assert all(torch.equal(tensors[key], FACTORS[key]) for key in FACTORS)
    assert not any(tensor.requires_grad for tensor in tensors.values())


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({}, "holds no tensors"),
        ({"r": 8, "lora_alpha": 16}, "2 of 2 entries are not tensors, first 'r'"),
        (torch.ones(2, 3), r"one bare tensor of shape \(2, 3\)"),
        ([torch.ones(1)], "a list of 1 entries, expected pairs of tensors"),
    ],
    ids=["empty", "configuration", "bare", "list"],
)
def test_a_pickle_without_named_tensors_is_refused(tmp_path: Path, content: Any, problem: str) -> None:
    torch.save(content, tmp_path / "a.bin")
    with pytest.raises(MalformedAdapterError, match=problem):
        open_adapter(tmp_path / "a.bin")


def test_a_header_of_odd_length_and_an_empty_tensor_do_not_matter(tmp_path: Path) -> None:
    values = torch.arange(6, dtype=torch.float64).reshape(2, 3)
    header = json.dumps(
        {
            "a": {"dtype": "F64", "shape": [2, 3], "data_offsets": [0, 48]},
            "b": {"dtype": "BF16", "shape": [0, 3], "data_offsets": [48, 48]},
        }
    ).encode()
    header += b" " * (3 - len(header) % 8)
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + values.numpy().tobytes())
    tensors = open_adapter(tmp_path / "a.safetensors").tensors
    assert torch.equal(tensors["a"], values)
    assert tensors["b"].shape == (0, 3)
    assert tensors["b"].dtype == torch.bfloat16


def test_a_header_whose_length_reads_like_a_page_is_a_header(tmp_path: Path) -> None:
    """15392 is 0x3c20: its bytes are a space and '<'."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode().ljust(0x3C20)
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + struct.pack("<f", 2.5))
    assert open_adapter(tmp_path / "a.safetensors").tensors["a"].tolist() == [2.5]


# ------------------------------------------------------------------------------------------------------- other formats

FORMATS_OF_PAIRS = {
    "lora_unet_down_blocks_0_attn1_to_q.lora_{down,up}.weight": "kohya",
    "diffusion_model.blocks.0.attn.q.lora_{down,up}.weight": "kohya",
    "lycoris_transformer_blocks_0_attn_to_q.lora_{down,up}.weight": "kohya",
    "unet.down_blocks.0.attn1.processor.to_q_lora.{down,up}.weight": "diffusers",
    "text_encoder.layers.0.q_proj.lora_linear_layer.{down,up}.weight": "diffusers",
    "unet.down_blocks.0.attn1.to_q.lora_{A,B}.weight": "diffusers",
    "diffusion_model.blocks.0.attn.q.lora_{A,B}.weight": "diffusers",
    "transformer.single_transformer_blocks.0.attn.to_q.lora_{A,B}.weight": "diffusers",
    "transformer.blocks.0.attn1.to_q.lora_{A,B}.weight": "diffusers",
    "double_blocks.0.processor.qkv_lora1.{down,up}.weight": "xlabs",
    "double_blocks.0.img_attn.qkv.lora_{A,B}.weight": "bfl",
    # Language models whose names begin like a pipeline's component.
    "transformer.h.0.attn.c_attn.lora_{A,B}.weight": "peft",
    "transformer.blocks.0.attn.Wqkv.lora_{A,B}.weight": "peft",
    "base_model.model.transformer.blocks.0.ffn.up_proj.lora_{A,B}.weight": "peft",
}


@pytest.mark.parametrize(("pair", "name"), FORMATS_OF_PAIRS.items())
def test_a_lone_file_is_known_by_its_keys(tmp_path: Path, pair: str, name: str) -> None:
    stem, _, rest = pair.partition("{")
    ways, _, tail = rest.partition("}")
    keys = [f"{stem}{way}{tail}" for way in ways.split(",")]
    save_file({key: torch.ones(2, 2) for key in keys}, tmp_path / "a.safetensors")
    adapter = read_adapter(tmp_path / "a.safetensors", ReadOptions(alpha=1))
    assert adapter.format == name
    (update,) = adapter.updates
    assert sorted(update.keys) == sorted(keys)


def test_a_pipelines_header_says_that_a_transformer_is_a_denoiser(tmp_path: Path) -> None:
    tensors = {f"transformer.h.0.attn.to_q.lora_{way}.weight": torch.ones(2, 2) for way in "AB"}
    header = {"lora_adapter_metadata": json.dumps({"transformer.r": 2, "transformer.lora_alpha": 3})}
    save_file(tensors, tmp_path / "a.safetensors", header)
    adapter = read_adapter(tmp_path / "a.safetensors")
    assert adapter.format == "diffusers"
    assert adapter.updates[0].update.scale.value == 1.5


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.gguf", b"GGUF\x03\x00\x00\x00", "not a readable GGUF file"),
        ("a.onnx_adapter", b"\x18\x00\x00\x00TORT\x00", "damaged ONNX Runtime adapter"),
        ("a.bin", b"GGUF\x03\x00\x00\x00", "not a readable GGUF file"),
        ("a.npz", b"PK\x03\x04", "not a readable npz file"),
    ],
)
def test_a_container_is_known_by_its_first_bytes_and_its_damage_is_said(
    tmp_path: Path, name: str, content: bytes, problem: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MalformedAdapterError, match=problem):
        read_adapter(tmp_path / name, ReadOptions())


def test_numpy_archives_are_told_apart_by_their_names(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **{"model.q.lora_a": np.ones((3, 2)), "model.q.lora_b": np.ones((2, 4))})
    np.savez(tmp_path / "b.npz", **{"model.q.lora_A.weight": np.ones((3, 2)), "model.q.lora_B.weight": np.ones((2, 4))})
    assert read_adapter(tmp_path / "a.npz", ReadOptions(alpha=1)).format == "mlx"
    assert read_adapter(tmp_path / "b.npz", ReadOptions()).format == "onnx"


@pytest.mark.parametrize(
    ("peft_type", "error", "problem"),
    [
        (
            "PREFIX_TUNING",
            UnmergeableAdapterError,
            "PREFIX_TUNING cannot be merged: it adds a trained key-value prefix",
        ),
        ("XLORA", UnmergeableAdapterError, "cannot be merged: its gate depends on the input"),
        ("DIAG", UnknownAdapterFormatError, "peft_type 'DIAG' is none of peft <= 0.21.2"),
    ],
)
def test_every_other_peft_type_is_refused_with_its_reason(
    tmp_path: Path, peft_type: str, error: type[LoraDeployError], problem: str
) -> None:
    folder = save_peft(tmp_path, {"base_model.model.q.ia3_l": torch.ones(3, 1)}, {"peft_type": peft_type})
    with pytest.raises(error, match=problem):
        read_adapter(folder, ReadOptions())


def test_peft_has_no_type_that_is_not_decided_here() -> None:
    from peft import PeftType

    from lora_deploy.adapters.tuners import TUNERS
    from lora_deploy.adapters.unsupported import PEFT_NEVER

    read = ["LORA", *(entry.name for entry in TUNERS)]
    decided = [*read, *PEFT_NEVER]
    assert {member.value for member in PeftType} <= set(decided)
    assert len(decided) == len(set(decided))


def test_a_registered_tuner_has_the_type_it_is_registered_under() -> None:
    from lora_deploy.adapters.tuners import TUNERS

    assert {entry.name: entry.load().peft_type for entry in TUNERS} == {entry.name: entry.name for entry in TUNERS}


def test_the_configuration_of_mlx_is_recognised_whatever_the_keys_are(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(1)}, tmp_path / "adapters.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"num_layers": 8, "lora_parameters": {"rank": 4, "scale": 10.0}}')
    with pytest.raises(MalformedAdapterError, match=r"a\.weight: mlx-lm writes lora_a, lora_b and m here"):
        read_adapter(tmp_path, ReadOptions())


def test_a_file_that_no_reader_recognises_lists_the_known_formats(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(UnknownAdapterFormatError, match=r"no known format has tensors such as 'a\.weight'") as caught:
        read_adapter(tmp_path / "a.safetensors", ReadOptions())
    assert "peft" in str(caught.value.hint)
    assert "state-dict" in str(caught.value.hint)


def test_a_file_that_two_readers_recognise_is_ambiguous(tmp_path: Path) -> None:
    mixed = {**FACTORS, "k.lora_A": torch.ones(2, 3), "k.lora_B": torch.ones(2, 2)}
    save_file(mixed, tmp_path / "a.safetensors")
    with pytest.raises(AmbiguousAdapterFormatError, match="readable as peft and as state-dict"):
        read_adapter(tmp_path / "a.safetensors", ReadOptions(alpha=2))


def _safetensors(folder: Path) -> bytes:
    tensors: dict[str, Tensor] = FACTORS
    save_file(tensors, folder / "whole.safetensors")
    return (folder / "whole.safetensors").read_bytes()


def _bin(folder: Path) -> bytes:
    torch.save(FACTORS, folder / "whole.bin")
    return (folder / "whole.bin").read_bytes()
