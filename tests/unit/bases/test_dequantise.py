"""A quantised base becomes a plain folder once: whole, with everything else as it was, in bounded memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_deploy.artifact import cache_root
from lora_deploy.bases import open_base
from lora_deploy.errors import DiskSpaceError, InputError, MalformedCheckpointError
from tests.builders import make_checkpoint
from tests.unit.bases.quantisations.unpacked import LAYER, tensor_of

NAME = f"{LAYER}.weight"
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "text_config": {"dtype": "float16", "quantization_config": {"quant_method": "fp8"}},
    "quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"},
}


def tensors(n_rows: int = 8) -> dict[str, Tensor]:
    """A weight and its scale, which two shards separate, and what is not packed."""
    return {
        NAME: torch.randn(n_rows, 4).to(torch.float8_e4m3fn),
        f"{NAME}_scale": torch.full((1,), 0.5),
        "norm.weight": torch.randn(5).to(torch.bfloat16),
        "position_ids": torch.arange(7),
        "empty.weight": torch.zeros(0, 3),
    }


def test_what_is_not_packed_is_copied_byte_for_byte_and_the_configuration_only_loses_its_quantisation(
    tmp_path: Path,
) -> None:
    stored = tensors()
    packed = make_checkpoint(tmp_path / "base", stored, CONFIG, n_shards=2)
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    base = open_base(str(tmp_path / "base"), dequantize=True)
    assert base.ref.name == str(tmp_path / "base")
    assert base.root.is_relative_to(cache_root() / "bases")
    assert set(base.tensors) == stored.keys() - {f"{NAME}_scale"}
    for name in base.tensors.keys() - {NAME}:
        assert bytes(base.read(name)) == bytes(packed.read(name)), name
        assert base.tensors[name].dtype == packed.tensors[name].dtype
    assert torch.equal(tensor_of(base, NAME), (stored[NAME].float() / 2).half())
    assert base.config == {"model_type": "llama", "text_config": {"dtype": "float16"}}
    assert (base.root / "tokenizer.json").read_text() == "{}"


def test_it_is_made_once_and_anew_when_a_byte_changes(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, tensors(), CONFIG)
    first = open_base(str(tmp_path), dequantize=True).root
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert open_base(str(tmp_path), dequantize=True).root == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    make_checkpoint(tmp_path, tensors() | {f"{NAME}_scale": torch.full((1,), 2.0)}, CONFIG)
    assert open_base(str(tmp_path), dequantize=True).root != first


def test_a_large_base_has_several_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_deploy.bases.dequantise._MAX_SHARD_BYTES", 70)
    make_checkpoint(tmp_path, tensors(), CONFIG)
    base = open_base(str(tmp_path), dequantize=True)
    assert base.files == ("model-00001-of-00003.safetensors", *(f"model-0000{k}-of-00003.safetensors" for k in (2, 3)))
    weight_map = json.loads((base.root / "model.safetensors.index.json").read_text())["weight_map"]
    assert {name: spec.file for name, spec in base.tensors.items()} == weight_map
    assert torch.equal(tensor_of(base, "position_ids"), torch.arange(7))


def test_a_plain_base_stays_where_it_is(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, {"a.weight": torch.zeros(2, 2)}, {})
    assert open_base(str(tmp_path), dequantize=True).root == tmp_path


def test_weights_that_are_plain_although_the_configuration_says_otherwise_only_lose_that_word(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, {NAME: torch.ones(2, 2)}, {"quantization_config": {"quant_method": "bitsandbytes"}})
    base = open_base(str(tmp_path), dequantize=True)
    assert torch.equal(tensor_of(base, NAME), torch.ones(2, 2))
    assert base.config == {}


def test_a_tensor_beside_its_packed_form_is_malformed(tmp_path: Path) -> None:
    both = {f"{LAYER}.{part}": torch.zeros(1, 8, dtype=torch.int32) for part in ("qweight", "qzeros")}
    both |= {f"{LAYER}.scales": torch.ones(1, 64).half(), NAME: torch.zeros(64, 1)}
    settings = {"quant_method": "awq", "bits": 4, "group_size": 1}
    make_checkpoint(tmp_path, both, {"quantization_config": settings})
    with pytest.raises(MalformedCheckpointError, match=f"has both {NAME} and its packed form"):
        open_base(str(tmp_path), dequantize=True)


def test_a_full_disk_is_foreseen_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    make_checkpoint(tmp_path, tensors(), CONFIG)
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(total=900, used=800, free=100))
    with pytest.raises(DiskSpaceError, match="found 100 free bytes"):
        open_base(str(tmp_path), dequantize=True)
    assert {path.suffix for path in (cache_root() / "bases").iterdir()} == {".lock"}


def test_a_component_of_a_pipeline_is_refused_and_no_flag_is_offered(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "unet", {NAME: torch.zeros(2, 2, dtype=torch.uint8)}, {"_class_name": "A"})
    (tmp_path / "model_index.json").write_text('{"_class_name": "P", "unet": ["diffusers", "UNet2DConditionModel"]}')
    (tmp_path / "unet" / "model.safetensors").rename(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    for dequantize in (False, True):
        with pytest.raises(InputError, match=r"quantised \(U8 weights\)") as caught:
            open_base(str(tmp_path), dequantize=dequantize)
        assert caught.value.hint == "use the 16-bit model it was made from"


_MEASURED = """
import sys, resource
from pathlib import Path
import torch
import lora_deploy.bases.dequantise
from lora_deploy.bases import open_base

def private():
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024

import threading, time
peak, done = [private()], threading.Event()
start = private()
def watch():
    while not done.is_set():
        peak[0] = max(peak[0], private())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
open_base(sys.argv[1], dequantize=True)
done.set()
thread.join()
print(peak[0] - start)
"""


def test_memory_does_not_grow_with_the_base(tmp_path: Path) -> None:
    """40 MB of FP8 become 80 MB, whose float64 would be 320: what is held beside the files is a few blocks."""
    weight = torch.randn(10_000, 4_000).to(torch.float8_e4m3fn)
    make_checkpoint(tmp_path, {NAME: weight, f"{NAME}_scale": torch.rand(10_000, 1)}, {"dtype": "bfloat16"})
    done = subprocess.run([sys.executable, "-c", _MEASURED, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 60e6
