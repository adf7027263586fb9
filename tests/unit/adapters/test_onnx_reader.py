"""Adapters of ONNX Runtime: what its own writer writes and what GenAI's builder writes, read by name and layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

from lora_deploy.adapter import Orientation
from lora_deploy.adapters.containers.onnx_adapter import read_onnx_adapter
from lora_deploy.adapters.interface import ReadOptions
from lora_deploy.adapters.open import read_adapter
from lora_deploy.errors import InputError, MalformedAdapterError, RecipeError, UnmergeableAdapterError
from lora_deploy.export.adapter_file import write_adapter
from lora_deploy.export.branches import input_names
from lora_deploy.export.multi_lora import NamedAdapter
from lora_deploy.export.record import RecordedInputs
from lora_deploy.tensors import DType
from lora_deploy.updates.low_rank import LowRank
from lora_deploy.validate import bind
from tests.builders import make_checkpoint, merged_values, save_peft

A = torch.tensor([[1.0], [2.0], [3.0]])
"""(in, r) = (3, 1)"""
B = torch.tensor([[1.0, 10.0]])
"""(r, out) = (1, 2)"""
DELTA = torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]], dtype=torch.float64)
NAME = "model.layers.0.self_attn.q_proj"


def write(folder: Path, tensors: dict[str, Tensor]) -> Path:
    write_adapter(folder / "a.onnx_adapter", tensors)
    return folder / "a.onnx_adapter"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_what_onnxruntime_writes_is_read_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    values = {"a.lora_A.weight": torch.randn(5, 3).to(dtype), "b.lora_B.weight": torch.randn(2, 7).to(dtype)}
    found, metadata = read_onnx_adapter(write(tmp_path, values))
    assert found.keys() == values.keys()
    assert all(torch.equal(found[name], values[name]) for name in values)
    assert metadata == {"adapter_version": "1", "model_version": "1"}


def test_double_and_a_rank_of_zero_are_read_as_onnxruntime_has_them(tmp_path: Path) -> None:
    file = onnxruntime.AdapterFormat()
    arrays = {"a.lora_A": np.arange(6.0).reshape(2, 3), "a.lora_B": np.empty((0, 4), np.float32)}
    file.set_parameters({name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()})
    file.export_adapter(str(tmp_path / "a.onnx_adapter"))
    found, _ = read_onnx_adapter(tmp_path / "a.onnx_adapter")
    assert found["a.lora_A"].dtype == torch.float64
    assert np.array_equal(found["a.lora_A"].numpy(), arrays["a.lora_A"])
    assert found["a.lora_B"].shape == (0, 4)


@pytest.mark.parametrize(
    "form",
    [
        "{}.lora_A.weight",
        "base_model.model.{}.lora_A.weight",
        "base_model.model.{}.lora_A.default.weight",
        "{}.lora_A",
    ],
)
def test_factors_are_transposed_and_their_scale_is_one(tmp_path: Path, form: str) -> None:
    down = form.format(NAME)
    adapter = read_adapter(write(tmp_path, {down: A, down.replace("lora_A", "lora_B"): B}))
    (found,) = adapter.updates
    assert (adapter.format, found.target, found.orientation) == ("onnx", f"{NAME}.weight", Orientation.UNKNOWN)
    assert isinstance(found.update, LowRank)
    assert found.update.scale.value == 1
    assert torch.equal(found.update.delta(), DELTA)


@pytest.mark.parametrize("attention", ["attn", "self_attn"])
def test_the_builders_name_of_attention_is_whichever_the_base_has(tmp_path: Path, attention: str) -> None:
    name = "model.layers.0.attn.q_proj"
    np.savez(tmp_path / "a.npz", **{f"{name}.lora_A.weight": A.numpy(), f"{name}.lora_B.weight": B.numpy()})
    stored = f"model.layers.0.{attention}.q_proj.weight"
    base = make_checkpoint(tmp_path / "base", {stored: torch.zeros(2, 3)}, {"model_type": "llama"})
    binding = bind([read_adapter(tmp_path / "a.npz")], base)
    assert list(binding.updates) == [stored]


def test_an_alpha_would_be_counted_twice(tmp_path: Path) -> None:
    path = write(tmp_path, {f"{NAME}.lora_A": A, f"{NAME}.lora_B": B})
    with pytest.raises(RecipeError, match="part of the factors"):
        read_adapter(path, ReadOptions(alpha=16))


BROKEN: dict[str, tuple[dict[str, Tensor], type[InputError], str]] = {
    "one factor": ({f"{NAME}.lora_A": A}, MalformedAdapterError, "has only lora_A"),
    "no factor": ({f"{NAME}.weight": A}, MalformedAdapterError, "is no input of a LoRA branch"),
    "not (in, r)": ({f"{NAME}.lora_A": A.T, f"{NAME}.lora_B": B}, MalformedAdapterError, "the ranks differ"),
    "quantised": ({f"{NAME}.lora_A.quant.weight": A}, UnmergeableAdapterError, "quantised factors"),
    "twice": ({f"{NAME}.lora_A": A, f"{NAME}.lora_A.weight": A}, MalformedAdapterError, "both are one input"),
}


@pytest.mark.parametrize("case", BROKEN.values(), ids=BROKEN)
def test_what_breaks_the_rules_is_refused(
    tmp_path: Path, case: tuple[dict[str, Tensor], type[InputError], str]
) -> None:
    tensors, error, told = case
    with pytest.raises(error, match=told):
        read_adapter(write(tmp_path, {name: tensor.contiguous() for name, tensor in tensors.items()}))


def test_dims_that_do_not_fit_their_bytes_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, {f"{NAME}.lora_A": A, f"{NAME}.lora_B": B})
    content = bytearray(path.read_bytes())
    at = content.index((3).to_bytes(8, "little") + (1).to_bytes(8, "little"))
    content[at : at + 8] = (1 << 40).to_bytes(8, "little")
    path.write_bytes(content)
    with pytest.raises(MalformedAdapterError, match="does not fit its 12 bytes"):
        read_adapter(path)


@pytest.mark.parametrize(
    ("name", "model_type", "is_turned"),
    [(f"{NAME}.weight", "llama", True), ("transformer.h.0.attn.c_attn.weight", "gpt2", False)],
    ids=["stored as (out, in)", "stored as (in, out)"],
)
def test_what_this_program_exports_reads_back_as_the_adapter_that_it_was(
    tmp_path: Path, name: str, model_type: str, is_turned: bool
) -> None:
    """Within the rounding of s·B to the graph's float32."""
    stored = (5, 7) if is_turned else (7, 5)
    base = make_checkpoint(tmp_path / "base", {name: torch.zeros(stored)}, {"model_type": model_type})
    module = f"base_model.model.{name.removesuffix('.weight')}"
    tensors = {f"{module}.lora_A.weight": torch.randn(2, 7), f"{module}.lora_B.weight": torch.randn(5, 2)}
    bound = bind([read_adapter(save_peft(tmp_path / "peft", tensors, {"r": 2, "lora_alpha": 3}))], base)
    down, up = input_names(name)
    inputs = RecordedInputs(down=down, up=up, n_in=7, n_out=5, is_turned=is_turned, dtype=DType.F32)
    written = NamedAdapter(name="mine", binding=bound).write(tmp_path, {name: inputs})
    found = bind([read_adapter(tmp_path / written.path)], base)
    expected, values = merged_values(bound)[name], merged_values(found)[name]
    assert (values - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert expected.abs().max() > 0
