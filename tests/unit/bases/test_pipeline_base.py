"""Folders of diffusion pipelines: how they open as one checkpoint, which weights are chosen, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_deploy.adapter import BaseHint
from lora_deploy.bases import open_base
from lora_deploy.companions import companion_files
from lora_deploy.errors import InputError, LoraDeployError, MalformedCheckpointError, RecipeError, UnsafeFileError
from lora_deploy.pipeline_layout import index_name, is_weight_file, plain_name
from lora_deploy.validate import bind
from tests.builders import linear_adapter, make_checkpoint

INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.42.1",
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
}
UNET = {"conv_in.weight": torch.randn(4, 3, 3, 3), "mid.to_q.weight": torch.randn(4, 4)}
WORDS = {"text_model.final_layer_norm.weight": torch.randn(4)}
DIFFUSERS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_pipeline(tmp_path / "pipeline")


def make_pipeline(root: Path, **changes: Any) -> Path:
    make_checkpoint(root / "unet", UNET, {"_class_name": "UNet2DConditionModel"})
    (root / "unet" / "model.safetensors").rename(root / "unet" / DIFFUSERS)
    make_checkpoint(root / "text_encoder", WORDS, {"model_type": "clip_text_model"})
    for name in ("scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"):
        (root / name).parent.mkdir()
        (root / name).write_text("{}")
    (root / "tokenizer" / "vocab.json").write_text("{}")
    (root / "LICENSE.md").write_text("free")
    (root / "model_index.json").write_text(json.dumps(INDEX | changes))
    return root


def test_a_pipeline_is_one_checkpoint_of_its_components(root: Path) -> None:
    checkpoint = open_base(str(root))
    assert set(checkpoint.tensors) == {*(f"unet/{name}" for name in UNET), *(f"text_encoder/{name}" for name in WORDS)}
    assert checkpoint.files == ("text_encoder/model.safetensors", f"unet/{DIFFUSERS}")
    assert checkpoint.config["unet"] == {"_class_name": "UNet2DConditionModel"}
    assert checkpoint.config["_class_name"] == "StableDiffusionPipeline"
    for name, values in UNET.items():
        assert bytes(checkpoint.read(f"unet/{name}")) == values.numpy().tobytes()
        model, inner = checkpoint.owner_of(f"unet/{name}")
        assert (inner, model.root) == (name, root / "unet")


def test_everything_but_weights_and_the_models_own_configurations_travels(root: Path) -> None:
    (root / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"not opened")
    (root / "unet" / "notes.md").write_text("kept")
    (root / "README.md").write_text("of the base")
    assert set(companion_files((), open_base(str(root)))) == {
        "LICENSE.md",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "unet/notes.md",
    }


def test_the_plain_weights_are_the_base_unless_a_variant_is_named(root: Path) -> None:
    halves = {name: tensor.half() for name, tensor in UNET.items()}
    make_checkpoint(root / "half", halves, {})
    (root / "half" / "model.safetensors").rename(root / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    plain, half = open_base(str(root)), open_base(str(root), variant="fp16")
    assert plain.files[1] == f"unet/{DIFFUSERS}"
    assert half.files == ("text_encoder/model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors")
    (root / "unet" / DIFFUSERS).unlink()
    assert open_base(str(root)).files == half.files  # there is nothing to choose
    (root / "unet" / "diffusion_pytorch_model.bf16.safetensors").write_bytes(b"")
    with pytest.raises(RecipeError, match="bf16, fp16") as caught:
        open_base(str(root))
    assert caught.value.hint == "--variant bf16"


def test_a_variant_is_not_for_a_single_model(root: Path) -> None:
    with pytest.raises(RecipeError, match="is for diffusion pipelines"):
        open_base(str(root / "unet"), variant="fp16")


@pytest.mark.parametrize(
    ("file", "plain", "index"),
    [
        ("model.safetensors", "model.safetensors", "model"),
        ("model.fp16.safetensors", "model.safetensors", "model"),
        (
            "diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
            "diffusion_pytorch_model-00001-of-00002.safetensors",
            "diffusion_pytorch_model",
        ),
        (
            "diffusion_pytorch_model-00001-of-00002.fp16.safetensors",
            "diffusion_pytorch_model-00001-of-00002.safetensors",
            "diffusion_pytorch_model",
        ),
    ],
)
def test_names_of_variants_become_plain(file: str, plain: str, index: str) -> None:
    assert plain_name(file) == plain
    assert index_name(plain) == f"{index}.safetensors.index.json"
    assert is_weight_file(file)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"../out": ["diffusers", "UNet2DConditionModel"]}, UnsafeFileError, "no plain name"),
        ({"a/b": ["diffusers", "UNet2DConditionModel"]}, UnsafeFileError, "no plain name"),
        ({"_class_name": ["pipeline_mine", "MyPipeline"]}, UnsafeFileError, "code of its own"),
        ({"vae": ["diffusers", "AutoencoderKL"]}, MalformedCheckpointError, "no such folder"),
        ({"unet": ["diffusers"]}, MalformedCheckpointError, "expected .library, class."),
    ],
)
def test_an_index_that_lists_what_is_not_a_component(
    tmp_path: Path, changes: dict[str, Any], error: type[LoraDeployError], said: str
) -> None:
    with pytest.raises(error, match=said):
        open_base(str(make_pipeline(tmp_path / "pipeline", **changes)))


@pytest.mark.parametrize("place", [".", "unet"])
def test_a_component_made_by_code_in_the_folder_is_refused(tmp_path: Path, place: str) -> None:
    root = make_pipeline(tmp_path / "pipeline", unet=["my_unet", "MyUNet"])
    (root / place / "my_unet.py").write_text("raise SystemExit")
    with pytest.raises(UnsafeFileError, match=r"made by my_unet\.py"):
        open_base(str(root))


def test_a_component_that_maps_its_classes_to_code_is_refused(root: Path) -> None:
    mapped = {"model_type": "mine", "auto_map": {"AutoModel": "mine.Model"}}
    (root / "text_encoder" / "config.json").write_text(json.dumps(mapped))
    with pytest.raises(UnsafeFileError, match="auto_map"):
        open_base(str(root))


def test_an_adapter_may_name_the_pipeline_or_the_component_as_its_base(root: Path) -> None:
    checkpoint = open_base(str(root))
    for name in ("elsewhere/pipeline", "elsewhere/unet", "other"):
        adapter = replace(linear_adapter({"mid.to_q.weight": (4, 4)}), base_hint=BaseHint(name=name))
        codes = {finding.code for finding in bind([adapter], checkpoint).findings}
        assert codes == ({"other-base"} if name == "other" else set())


def test_a_component_outside_the_pipeline_is_refused(root: Path, tmp_path: Path) -> None:
    (root / "unet").rename(tmp_path / "elsewhere")
    (root / "unet").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeFileError, match="outside the pipeline"):
        open_base(str(root))


def test_pickled_weights_are_named_and_not_opened(root: Path) -> None:
    (root / "unet" / DIFFUSERS).rename(root / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(MalformedCheckpointError, match=r"only pickled weights \(diffusion_pytorch_model\.bin\)"):
        open_base(str(root))


def test_a_model_without_weights_or_with_unlisted_shards_is_refused(root: Path) -> None:
    (root / "unet" / DIFFUSERS).rename(root / "unet" / "diffusion_pytorch_model-00001-of-00002.safetensors")
    make_checkpoint(root / "unet", {"conv_out.weight": torch.zeros(1)}, {})
    (root / "unet" / "model.safetensors").rename(root / "unet" / "diffusion_pytorch_model-00002-of-00002.safetensors")
    with pytest.raises(MalformedCheckpointError, match=r"2 weight files and no diffusion_pytorch_model"):
        open_base(str(root))
    for file in (root / "unet").glob("*.safetensors"):
        file.unlink()
    (root / "unet" / "config.json").write_text("{}")
    with pytest.raises(MalformedCheckpointError, match="UNet2DConditionModel has no safetensors weights"):
        open_base(str(root))


def test_packed_weights_of_a_component_are_refused(tmp_path: Path) -> None:
    root = make_pipeline(tmp_path / "pipeline")
    config = {"_class_name": "UNet2DConditionModel", "quantization_config": {"quant_method": "bitsandbytes"}}
    (root / "unet" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"unet: quantised \(bitsandbytes\)"):
        open_base(str(root))
