"""Exports of pipelines: folders, files of weights and configurations, with graphs made by hand in milliseconds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lora_deploy.checkpoint import open_checkpoint
from lora_deploy.companions import companion_files
from lora_deploy.errors import ExportError
from lora_deploy.export.binding_table import Layout, Taken
from lora_deploy.export.blueprint import write_synthetic
from lora_deploy.export.components import graphs_of, stages_of_component
from lora_deploy.export.diffusers import DiffusersMaker
from lora_deploy.export.execute import execute_export
from lora_deploy.export.interface import Drawing, GraphTask
from lora_deploy.export.options import ExportOptions
from lora_deploy.export.plan import ExportPlan, plan_export
from lora_deploy.export.replay import replay_export
from lora_deploy.export.sources import CheckpointSource, components_of
from tests.builders import make_checkpoint
from tests.unit.export.hand_made import expected, plain, weights

UNET = {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.42.1"}
WORDS = {"model_type": "clip_text_model", "architectures": ["CLIPTextModel"], "torch_dtype": "float16"}


def make_pipeline(root: Path) -> Path:
    """Both components hold the same weights: each graph must find them in its own folder."""
    make_checkpoint(root / "unet", weights(), UNET)
    (root / "unet" / "model.safetensors").rename(root / "unet" / "diffusion_pytorch_model.safetensors")
    make_checkpoint(root / "text_encoder", weights(), WORDS)
    (root / "scheduler").mkdir()
    (root / "scheduler" / "scheduler_config.json").write_text("{}")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "unet": ["diffusers", "UNet2DConditionModel"],
    }
    (root / "model_index.json").write_text(json.dumps(index))
    return root


@dataclass(frozen=True)
class HandMaker(DiffusersMaker):
    """Draws the same two layers for every component."""

    packages: tuple[str, ...] = ()

    def draw(self, task: GraphTask) -> Iterator[Drawing]:
        for component in ("text_encoder", "unet"):
            for seed, root in enumerate(task.checkpoints):
                model = onnx_ir.serde.deserialize_model(plain(tensors_of(root / component)))
                yield Drawing(component=component, seed=seed, model=model, metadata={}, folder=component)


def tensors_of(folder: Path) -> Mapping[str, Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def source_of(root: Path) -> CheckpointSource:
    checkpoint = open_checkpoint(root)
    return CheckpointSource(checkpoint, companion_files((), checkpoint))


def plan_of(root: Path, **options: Any) -> ExportPlan:
    return replace(plan_export(source_of(root), ExportOptions(**options)), maker=HandMaker())


def test_every_component_runs_from_its_own_folder(tmp_path: Path) -> None:
    root, out = make_pipeline(tmp_path / "pipeline"), tmp_path / "onnx"
    changed = {name: tensor + 1 for name, tensor in weights().items()}
    make_checkpoint(root / "text_encoder", changed, WORDS)
    exported = execute_export(plan_of(root), out)
    assert {name: path.relative_to(out).as_posix() for name, path in exported.graphs.items()} == {
        "text_encoder": "text_encoder/model.onnx",
        "unet": "unet/model.onnx",
    }
    x = torch.randn(3, 8)
    for component, tensors in (("text_encoder", changed), ("unet", weights())):
        session = onnxruntime.InferenceSession(exported.graphs[component], providers=["CPUExecutionProvider"])
        np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], expected(tensors, x).numpy(), rtol=1e-4)
    assert list(replay_export(source_of(root), out)) == []
    assert (out / "scheduler" / "scheduler_config.json").is_file()
    assert not (out / "config.json").exists()
    found = [json.loads((out / name / "config.json").read_text()) for name in ("unet", "text_encoder")]
    assert found[0] == UNET
    assert found[1]["dtype"] == "float32"
    assert "torch_dtype" not in found[1]
    assert execute_export(plan_of(root), out).was_done


def test_a_lost_byte_of_a_components_weights_is_found(tmp_path: Path) -> None:
    root, out = make_pipeline(tmp_path / "pipeline"), tmp_path / "onnx"
    execute_export(plan_of(root), out)
    path = out / "unet" / "model.onnx.data"
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    (fault,) = replay_export(source_of(root), out)
    assert fault.startswith("unet/model.onnx.data")


def test_graphs_share_a_weight_only_within_a_folder() -> None:
    layout, origin = Layout(), Taken(tensor="vae/quant_conv.weight", shape=(2, 2))
    places = [
        layout.place(f"{folder}/model.onnx.data", "F32", (2, 2), 16, origin)
        for folder in ("vae_encoder", "vae_decoder", "vae_encoder")
    ]
    assert places == [0, 1, 0]
    assert [layout.slots[k].name for k in (0, 1)] == ["model.onnx.data"] * 2


def test_the_graphs_are_of_the_models_not_of_the_scheduler(tmp_path: Path) -> None:
    one, other = (make_pipeline(tmp_path / name) for name in ("one", "other"))
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", "EulerDiscreteScheduler"]}))
    make_checkpoint(other / "text_encoder", {name: tensor * 2 for name, tensor in weights().items()}, WORDS)
    assert plan_of(one).blueprint.digest == plan_of(other).blueprint.digest
    (other / "unet" / "config.json").write_text(json.dumps({**UNET, "act_fn": "gelu"}))
    assert plan_of(one).blueprint.digest != plan_of(other).blueprint.digest


def test_synthetic_pipelines_open_as_the_pipeline_does_with_no_value_alike(tmp_path: Path) -> None:
    root = make_pipeline(tmp_path / "pipeline")
    write_synthetic(plan_of(root).blueprint, tmp_path / "synthetic", seed=3)
    made = open_checkpoint(tmp_path / "synthetic")
    assert {n: s.shape for n, s in made.tensors.items()} == {n: s.shape for n, s in source_of(root).specs.items()}
    contents = [bytes(made.read(name)) for name in made.tensors]
    assert len(set(contents)) == len(contents)
    assert "dtype" not in made.config["unet"]
    assert components_of(source_of(root)) == ("text_encoder", "unet")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"storage": "shared"}, "--weights shared: a pipeline's graphs"),
        ({"layout": "genai"}, "--layout genai: is not for pipelines"),
        ({"maker": "transformers"}, "--maker transformers"),
    ],
)
def test_what_a_pipeline_cannot_have(tmp_path: Path, options: dict[str, str], said: str) -> None:
    with pytest.raises(ExportError, match=said):
        plan_export(source_of(make_pipeline(tmp_path / "pipeline")), ExportOptions(**options))


def test_a_single_model_has_no_layout_of_pipelines(tmp_path: Path) -> None:
    root = make_pipeline(tmp_path / "pipeline") / "text_encoder"
    with pytest.raises(ExportError, match="--layout diffusers: is not for single models"):
        plan_export(source_of(root), ExportOptions(layout="diffusers"))


def test_a_component_of_an_unknown_class_is_named_with_its_class() -> None:
    with pytest.raises(ExportError, match="prior: cannot be exported: no sample inputs are known for Linear"):
        list(stages_of_component("prior", torch.nn.Linear(2, 2), {}))


def test_the_autoencoder_is_two_graphs_and_the_safety_checker_none() -> None:
    assert [graphs_of(name) for name in ("vae", "safety_checker", "unet")] == [
        ("vae_encoder", "vae_decoder"),
        (),
        ("unet",),
    ]
