"""One trained adapter in every file form, one base in every file form and dtype; the peer is PEFT 0.21.2."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_deploy.adapters.interface import ReadOptions
from lora_deploy.errors import MalformedAdapterError
from tests.peer.models import llama, qwen2
from tests.peer.trained import (
    Trained,
    assert_rounded_once,
    merge,
    save_base,
    tensors_of,
    train,
)

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROOT = "base_model.model."


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """An adapter with factors, magnitudes, a bias and a saved head."""
    config = LoraConfig(
        r=3, lora_alpha=5, target_modules=LINEAR, use_dora=True, bias="lora_only", modules_to_save=["lm_head"]
    )
    return train(qwen2(), config, tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def raw(trained: Trained) -> dict[str, Tensor]:
    """The adapter's tensors as they are called in the adapted model's own state dict."""
    wanted = ("lora_", "modules_to_save", "original_module", "base_layer.bias")
    state = trained.model.state_dict()
    return {name: t.float().contiguous() for name, t in state.items() if any(part in name for part in wanted)}


@pytest.fixture(scope="module")
def expected(trained: Trained, raw: dict[str, Tensor]) -> dict[str, Tensor]:
    """PEFT's merge; it takes the model to pieces, so ``raw`` is taken before."""
    return trained.merged()


def _inside_layers(wrapper: str) -> Callable[[str], str]:
    return lambda name: name.replace("self_attn.", f"self_attn.{wrapper}.").replace("mlp.", f"mlp.{wrapper}.")


RAW_FORMS: Mapping[str, Callable[[str], str]] = {
    "as it is": lambda name: name,
    "compiled": lambda name: f"_orig_mod.{name}",
    "compiled layers": lambda name: name.replace("layers.0.", "layers.0._orig_mod."),
    "data parallel": lambda name: f"module.{name}",
    "compiled and data parallel": lambda name: f"module._orig_mod.{name}",
    "FSDP": lambda name: f"_fsdp_wrapped_module.{_inside_layers('_fsdp_wrapped_module')(name)}",
    "activation checkpoints": _inside_layers("_checkpoint_wrapped_module"),
    "without PEFT's prefix": lambda name: name.removeprefix(ROOT),
}


@pytest.mark.parametrize("form", RAW_FORMS)
def test_a_raw_state_dict_merges_as_the_folder_that_peft_0_21_2_saves(
    form: str, trained: Trained, raw: dict[str, Tensor], expected: dict[str, Tensor], tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(trained.adapter, folder)
    save_file({RAW_FORMS[form](name): t for name, t in raw.items()}, folder / "adapter_model.safetensors")
    assert any(".lora_A.default." in name for name in load_file(folder / "adapter_model.safetensors"))
    merge(folder, trained.base, tmp_path / "out")
    assert_rounded_once(tensors_of(tmp_path / "out"), expected)


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_model.pt"])
def test_a_pickled_adapter_merges_as_the_safetensors_that_peft_0_21_2_saves(
    name: str, trained: Trained, expected: dict[str, Tensor], tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    shutil.copy(trained.adapter / "adapter_config.json", folder)
    torch.save(load_file(trained.adapter / "adapter_model.safetensors"), folder / name)
    merge(folder, trained.base, tmp_path / "out")
    assert_rounded_once(tensors_of(tmp_path / "out"), expected)


def _pickled(base: Path, folder: Path) -> None:
    torch.save(tensors_of(base), folder / "pytorch_model.bin")


def _pickled_in_shards(base: Path, folder: Path) -> None:
    tensors = tensors_of(base)
    files = {name: f"pytorch_model-{k % 2 + 1:05d}-of-00002.bin" for k, name in enumerate(tensors)}
    for file in set(files.values()):
        torch.save({name: t for name, t in tensors.items() if files[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def _sharded(base: Path, folder: Path) -> None:
    model = qwen2()
    model.load_state_dict(tensors_of(base))
    save_base(model, folder, max_shard_size="10KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2


@pytest.mark.parametrize("write", [_sharded, _pickled, _pickled_in_shards], ids=lambda write: write.__name__)
def test_a_base_in_other_files_gives_the_same_merged_model(
    write: Callable[[Path, Path], None],
    trained: Trained,
    expected: dict[str, Tensor],
    tmp_path: Path,
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    shutil.copy(trained.base / "config.json", base)
    write(trained.base, base)
    merge(trained.adapter, base, tmp_path / "out")
    assert_rounded_once(tensors_of(tmp_path / "out"), expected)


def test_a_lone_file_needs_its_alpha_and_merges_with_it_as_peft_0_21_2_does(tmp_path: Path) -> None:
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 2})
    trained = train(llama(), config, tmp_path)
    lone = tmp_path / "lone" / "adapter.safetensors"
    lone.parent.mkdir()
    tensors = load_file(trained.adapter / "adapter_model.safetensors")
    save_file(tensors, lone)
    with pytest.raises(MalformedAdapterError, match="alpha") as caught:
        merge(lone, trained.base, tmp_path / "out")
    assert "--alpha" in str(caught.value.hint)

    expected = trained.merged()
    merge(lone, trained.base, tmp_path / "out", read=ReadOptions(alpha=5))
    assert_rounded_once(tensors_of(tmp_path / "out"), expected)
    save_file(tensors, lone, {"lora_alpha": "5"})
    merge(lone, trained.base, tmp_path / "from header")
    assert_rounded_once(tensors_of(tmp_path / "from header"), expected)


# -------------------------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("use_dora", [False, True], ids=["plain", "DoRA"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_bytes_are_float64_rounded_once_to_the_base_dtype_where_peft_0_21_2_rounds_twice(
    stored: torch.dtype, use_dora: bool, tmp_path: Path
) -> None:
    """PEFT in the base's dtype rounds the update before it adds it; its float64 merge rounds nothing."""
    model = llama().to(stored)
    trained = train(model, LoraConfig(r=3, lora_alpha=5, target_modules=LINEAR, use_dora=use_dora), tmp_path)
    merge(trained.adapter, trained.base, tmp_path / "out", dtype="base")
    found, base = tensors_of(tmp_path / "out"), tensors_of(trained.base)
    assert {t.dtype for t in found.values()} == {stored}
    untouched = [name for name in found if not any(f".{target}." in name for target in LINEAR)]
    assert len(untouched) == 2 + 5
    assert all(torch.equal(found[name], base[name]) for name in untouched)
    assert_rounded_once(found, trained.merged())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_cast_merge_rounds_the_exact_value_once_to_any_dtype(stored: torch.dtype, dtype: str, tmp_path: Path) -> None:
    trained = train(llama().to(stored), LoraConfig(r=3, lora_alpha=5, target_modules=LINEAR), tmp_path)
    merge(trained.adapter, trained.base, tmp_path / "out", dtype=dtype)
    found = tensors_of(tmp_path / "out")
    assert {t.dtype for t in found.values()} == {getattr(torch, dtype)}
    assert_rounded_once(found, trained.merged())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=str)
def test_a_16_bit_adapter_is_taken_for_what_it_is(stored: torch.dtype, tmp_path: Path) -> None:
    def in_16_bits(adapted: torch.nn.Module) -> None:
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(stored)

    config = LoraConfig(r=3, lora_alpha=5, target_modules=LINEAR)
    trained = train(llama(), config, tmp_path, before=in_16_bits)
    assert {t.dtype for t in load_file(trained.adapter / "adapter_model.safetensors").values()} == {stored}
    merge(trained.adapter, trained.base, tmp_path / "out")
    assert_rounded_once(tensors_of(tmp_path / "out"), trained.merged())


# ------------------------------------------------------------------------------------------------- adapters by name


def test_an_adapter_in_a_sub_folder_or_beside_others_in_one_file_is_chosen_by_name(tmp_path: Path) -> None:
    def add_another(adapted: torch.nn.Module) -> None:
        adapted.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))

    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"])
    trained = train(llama(), config, tmp_path, before=add_another)
    state = {n: t.float().contiguous() for n, t in trained.model.state_dict().items() if "lora_" in n}
    several = tmp_path / "several"
    several.mkdir()
    shutil.copy(trained.adapter / "adapter_config.json", several)
    save_file(state, several / "adapter_model.safetensors")

    merge(trained.adapter, trained.base, tmp_path / "plain")
    merge(several, trained.base, tmp_path / "chosen", read=ReadOptions(adapter_name="default"))
    merge(trained.adapter, trained.base, tmp_path / "other", read=ReadOptions(adapter_name="other"))
    module = trained.model.base_model.model.model.layers[0].self_attn.q_proj
    other = module.get_base_layer().weight + module.get_delta_weight("other")
    expected = trained.merged()
    name = "model.layers.0.self_attn.q_proj.weight"
    assert_rounded_once({name: tensors_of(tmp_path / "other")[name]}, {name: other.detach()})
    assert_rounded_once(tensors_of(tmp_path / "plain"), expected)
    assert_rounded_once(tensors_of(tmp_path / "chosen"), expected)
