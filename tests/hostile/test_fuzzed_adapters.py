"""Mutated adapters of every format: a header, a key, a shape, a setting changed at random is read or refused by name.

Promise under test: whatever a file holds, reading and inspecting it gives an adapter or a ``LoraDeployError``; any
other exception, a crash or a warning is a fault. Every reader of ``READERS`` has a sample here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lora_deploy.adapters import READERS
from lora_deploy.adapters.interface import ReadOptions
from lora_deploy.adapters.open import read_adapter
from lora_deploy.errors import LoraDeployError
from lora_deploy.export.adapter_file import write_adapter
from lora_deploy.inspection import inspect_adapter

EXAMPLES = 40
"""A mutation: some milliseconds."""
OPTIONS = (ReadOptions(), ReadOptions(alpha=4.0), ReadOptions(adapter_name="unet"), ReadOptions(mlx_legacy_alpha=True))


def _peft(folder: Path) -> None:
    name = "base_model.model.layers.0.q_proj"
    tensors = {
        f"{name}.lora_A.weight": torch.randn(2, 6),
        f"{name}.lora_B.weight": torch.randn(4, 2),
        f"{name}.lora_magnitude_vector": torch.rand(4),
        "base_model.model.embed_tokens.lora_embedding_A": torch.randn(2, 9),
        "base_model.model.embed_tokens.lora_embedding_B": torch.randn(6, 2),
        "base_model.model.embed_tokens.lora_magnitude_vector": torch.rand(6),
        "base_model.model.head.weight": torch.randn(3, 6),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_dora": True, "modules_to_save": ["head"]}
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}, "target_parameters": None}
    (folder / "adapter_config.json").write_text(json.dumps(config | patterns | {"init_lora_weights": True}))


def _mlx(folder: Path) -> None:
    save_file(_mlx_tensors(), folder / "adapters.safetensors")
    _mlx_config(folder)


def _mlx_npz(folder: Path) -> None:
    np.savez(folder / "adapters.npz", **{name: tensor.numpy() for name, tensor in _mlx_tensors().items()})
    _mlx_config(folder)


def _mlx_tensors() -> dict[str, Tensor]:
    return {
        "model.layers.0.q_proj.lora_a": torch.randn(6, 2),
        "model.layers.0.q_proj.lora_b": torch.randn(2, 4),
        "model.layers.0.mlp.switch_mlp.up_proj.lora_a": torch.randn(3, 2, 6),
        "model.layers.0.mlp.switch_mlp.up_proj.lora_b": torch.randn(3, 4, 2),
    }


def _mlx_config(folder: Path) -> None:
    told = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": {"rank": 2, "scale": 20.0, "alpha": 16}}
    (folder / "adapter_config.json").write_text(json.dumps(told))


def _torchtune(folder: Path) -> None:
    name = "layers.0.attn.q_proj"
    tensors = {
        f"{name}.lora_a.weight": torch.randn(2, 6),
        f"{name}.lora_b.weight": torch.randn(4, 2),
        f"{name}.magnitude": torch.rand(4),
    }
    torch.save(tensors, folder / "adapter_model.pt")
    config = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def _litgpt(folder: Path) -> None:
    name = "transformer.h.0.attn.qkv"
    tensors = {f"{name}.lora_A": torch.randn(4, 8), f"{name}.lora_B": torch.randn(12, 2)}
    torch.save({"model": tensors}, folder / "lit_model.pth.lora")
    told = {"lora_r": 2, "lora_alpha": 4, "lora_query": True, "lora_key": False, "lora_value": True}
    (folder / "hyperparameters.yaml").write_text(yaml.dump(told))
    (folder / "model_config.yaml").write_text(
        yaml.dump({"name": "tiny", "n_head": 2, "n_query_groups": 1, "n_embd": 8, "mlp_class_name": "LLaMAMLP"})
    )


def _cloneofsimo(folder: Path) -> None:
    tensors = {f"unet:{k}:{slot}": torch.randn(4, 4) for k in range(2) for slot in ("up", "down")}
    metadata = {"unet": '["CrossAttention"]', "unet:0:rank": "4", "unet:1:rank": "4"}
    save_file(tensors, folder / "lora.safetensors", metadata)


def _gguf(folder: Path) -> None:
    writer = gguf.GGUFWriter(folder / "adapter.gguf", "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 4)
    for name in ("blk.0.attn_q.weight", "blk.0.ffn_down.weight"):
        writer.add_tensor(f"{name}.lora_a", np.random.default_rng(1).standard_normal((2, 6)).astype(np.float32))
        writer.add_tensor(f"{name}.lora_b", np.random.default_rng(2).standard_normal((4, 2)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _onnx(folder: Path) -> None:
    name = "model.layers.0.self_attn.q_proj"
    values = {f"{name}.lora_A.weight": torch.randn(6, 2), f"{name}.lora_B.weight": torch.randn(2, 4)}
    write_adapter(folder / "a.onnx_adapter", values)


def _state_dict(folder: Path) -> None:
    tensors = {"q.weight": torch.randn(4, 6), "q.lora_A": torch.randn(2, 6), "q.lora_B": torch.randn(4, 2)}
    save_file(tensors | {"q.lora_alpha": torch.tensor(4.0)}, folder / "model.safetensors")


def _kohya(folder: Path) -> None:
    """A module of every algorithm."""
    modules: dict[str, dict[str, tuple[int, ...]]] = {
        "lora_te_text_model_q": {"lora_down.weight": (2, 6), "lora_up.weight": (4, 2), "dora_scale": (4, 1)},
        "lora_unet_conv": {
            "lora_down.weight": (2, 6, 1, 1),
            "lora_up.weight": (4, 2, 1, 1),
            "dora_scale": (1, 6, 1, 1),
        },
        "lora_unet_hada": {f"hada_w{k}_{way}": (4, 2) if way == "a" else (2, 6) for k in "12" for way in "ab"},
        "lora_unet_kron": {"lokr_w1": (2, 2), "lokr_w2_a": (2, 1), "lokr_w2_b": (1, 3), "scalar": ()},
        "lora_unet_oft": {"oft_blocks": (2, 2, 2), "rescale": (4, 1)},
        "lora_unet_boft": {"oft_blocks": (2, 2, 2, 2)},
        "lora_unet_glora": {"a1.weight": (6, 2), "a2.weight": (2, 6), "b1.weight": (4, 2), "b2.weight": (2, 6)},
        "lora_unet_ia3": {"weight": (4,)},
        "lora_unet_diff": {"diff": (4, 6), "diff_b": (4,)},
        "lora_unet_norm": {"w_norm": (4,), "b_norm": (4,)},
    }
    tensors = {f"{name}.{slot}": torch.randn(shape) for name, slots in modules.items() for slot, shape in slots.items()}
    tensors["lora_unet_conv.lora_mid.weight"] = torch.randn(2, 2, 3, 3)
    tensors["lora_unet_ia3.on_input"] = torch.tensor(0)
    tensors |= {f"{name}.alpha": torch.tensor(0.5) for name in list(modules)[:7]}
    save_file(tensors, folder / "lora.safetensors", {"ss_network_module": "lycoris.kohya", "ss_network_dim": "2"})


def _diffusers(folder: Path) -> None:
    tensors = {
        "unet.down.to_q.lora_A.weight": torch.randn(2, 6),
        "unet.down.to_q.lora_B.weight": torch.randn(4, 2),
        "unet.down.to_q.lora_magnitude_vector": torch.rand(4),
        "text_encoder.q_proj.lora_linear_layer.down.weight": torch.randn(2, 6),
        "text_encoder.q_proj.lora_linear_layer.up.weight": torch.randn(4, 2),
        "unet.attn1.processor.to_out_lora.down.weight": torch.randn(2, 6),
        "unet.attn1.processor.to_out_lora.up.weight": torch.randn(4, 2),
    }
    told = {"unet.r": 2, "unet.lora_alpha": 4, "unet.use_dora": True, "text_encoder.lora_alpha": 2}
    header = {"lora_adapter_metadata": json.dumps(told | {"text_encoder.r": 2})}
    save_file(tensors, folder / "pytorch_lora_weights.safetensors", header)


def _xlabs(folder: Path) -> None:
    name = "double_blocks.0.processor.qkv_lora1"
    tensors = {f"{name}.down.weight": torch.randn(2, 6), f"{name}.up.weight": torch.randn(18, 2)}
    save_file(tensors, folder / "lora.safetensors")


def _bfl(folder: Path) -> None:
    name = "double_blocks.0.img_attn"
    tensors = {
        f"{name}.qkv.lora_A.weight": torch.randn(2, 6),
        f"{name}.qkv.lora_B.weight": torch.randn(18, 2),
        f"{name}.qkv.lora_B.bias": torch.randn(18),
        f"{name}.norm.query_norm.scale": torch.randn(3),
    }
    save_file(tensors, folder / "lora.safetensors")


SAMPLES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "peft": ("peft", _peft),
    "kohya": ("kohya", _kohya),
    "diffusers": ("diffusers", _diffusers),
    "xlabs": ("xlabs", _xlabs),
    "bfl": ("bfl", _bfl),
    "mlx": ("mlx", _mlx),
    "mlx npz": ("mlx", _mlx_npz),
    "torchtune": ("torchtune", _torchtune),
    "litgpt": ("litgpt", _litgpt),
    "cloneofsimo": ("cloneofsimo", _cloneofsimo),
    "gguf": ("gguf", _gguf),
    "onnx": ("onnx", _onnx),
    "state dict": ("state-dict", _state_dict),
}
"""Format, and how a sound adapter of it is written."""

settled = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def is_read_or_refused(path: Path, options: ReadOptions) -> None:
    with suppress(LoraDeployError):
        inspect_adapter(read_adapter(path, options))


@pytest.fixture
def sample(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path / "sample"
    folder.mkdir()
    SAMPLES[request.param][1](folder)
    return folder


def mutated(sample: Path) -> Path:
    """A fresh copy to spoil."""
    copy = sample.with_name("mutated")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(sample, copy)
    return copy


def test_every_reader_has_a_sample_that_it_reads(tmp_path: Path) -> None:
    missing = {entry.name for entry in READERS} - {name for name, _ in SAMPLES.values()}
    assert not missing, f"write a small sound adapter for {missing} and add it to SAMPLES"
    for label, (name, write) in SAMPLES.items():
        (tmp_path / label).mkdir()
        write(tmp_path / label)
        assert read_adapter(tmp_path / label).format == name


@pytest.mark.parametrize("sample", SAMPLES, indirect=True)
@settled
@given(data=st.data())
def test_bytes_changed_anywhere_are_read_or_refused(sample: Path, data: st.DataObject) -> None:
    folder = mutated(sample)
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    content = bytearray(path.read_bytes())
    how = data.draw(st.sampled_from(["replace", "insert", "cut", "repeat"]))
    # Most of what can go wrong is in the first bytes.
    start = data.draw(st.integers(0, min(len(content), 400)) | st.integers(0, len(content)))
    length = data.draw(st.integers(1, 8))
    if how == "replace":
        content[start : start + length] = data.draw(st.binary(min_size=length, max_size=length))
    elif how == "insert":
        content[start:start] = data.draw(st.binary(min_size=1, max_size=8))
    elif how == "cut":
        del content[start:]
    else:
        content[start:start] = content[start : start + 64]
    path.write_bytes(content)
    is_read_or_refused(folder, data.draw(st.sampled_from(OPTIONS)))


WITH_JSON = [label for label in SAMPLES if label in {"peft", "mlx", "mlx npz", "torchtune"}]


@pytest.mark.parametrize("sample", WITH_JSON, indirect=True)
@settled
@given(data=st.data())
def test_settings_of_any_type_are_read_or_refused(sample: Path, data: st.DataObject) -> None:
    folder = mutated(sample)
    path = folder / "adapter_config.json"
    config: dict[str, Any] = json.loads(path.read_text())
    holder = config
    key = data.draw(st.sampled_from(sorted(config)))
    if isinstance(config[key], dict) and config[key] and data.draw(st.booleans()):
        holder = config[key]
        key = data.draw(st.sampled_from(sorted(holder)))
    if data.draw(st.booleans()):
        holder[key] = data.draw(JSON)
    else:
        del holder[key]
    path.write_text(json.dumps(config))
    is_read_or_refused(folder, data.draw(st.sampled_from(OPTIONS)))


@pytest.mark.parametrize("sample", ["litgpt"], indirect=True)
@settled
@given(data=st.data())
def test_settings_in_yaml_of_any_type_are_read_or_refused(sample: Path, data: st.DataObject) -> None:
    folder = mutated(sample)
    path = folder / data.draw(st.sampled_from(["hyperparameters.yaml", "model_config.yaml"]))
    content = yaml.safe_load(path.read_text())
    content[data.draw(st.sampled_from(sorted(content)))] = data.draw(JSON)
    path.write_text(yaml.dump(content))
    is_read_or_refused(folder, ReadOptions())


WITH_SAFETENSORS = [label for label in SAMPLES if label not in {"mlx npz", "torchtune", "litgpt", "gguf", "onnx"}]


@pytest.mark.parametrize("sample", WITH_SAFETENSORS, indirect=True)
@settled
@given(data=st.data())
def test_keys_and_shapes_of_any_sort_are_read_or_refused(sample: Path, data: st.DataObject) -> None:
    folder = mutated(sample)
    path = next(folder.glob("*.safetensors"))
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    name = data.draw(st.sampled_from(sorted(tensors)))
    how = data.draw(st.sampled_from(["drop", "rename", "copy", "shape", "dtype", "value", "metadata"]))
    if how == "drop":
        del tensors[name]
    elif how == "rename":
        parts = name.split(".")
        parts[data.draw(st.integers(0, len(parts) - 1))] = data.draw(st.text("abAB01._:", max_size=4))
        tensors[".".join(parts)] = tensors.pop(name)
    elif how == "copy":
        tensors[name.replace("0", "1") + data.draw(st.sampled_from(["", ".weight", ".x"]))] = tensors[name].clone()
    elif how == "shape":
        tensors[name] = torch.ones(data.draw(st.lists(st.integers(0, 4), max_size=4)))
    elif how == "dtype":
        tensors[name] = tensors[name].to(data.draw(st.sampled_from([torch.int8, torch.bool, torch.float64])))
    elif how == "value":
        value = data.draw(st.sampled_from([torch.nan, torch.inf, 0.0, 3e38]))
        tensors[name] = torch.full(tensors[name].shape, value)
    else:
        metadata = (metadata or {}) | {data.draw(st.sampled_from(["unet", "alpha", "unet:0:rank"])): "{x"}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    is_read_or_refused(folder, data.draw(st.sampled_from(OPTIONS)))
