"""Graphs of tiny diffusion pipelines say what diffusers says, with merged weights, on sizes that nobody traced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor

from lora_deploy import pipeline
from lora_deploy.checkpoint import open_checkpoint
from lora_deploy.export.execute import Exported
from lora_deploy.export.replay import replay_export
from lora_deploy.export.sources import CheckpointSource
from lora_deploy.merge.options import MergeOptions
from lora_deploy.validate import BindOptions
from tests import pipelines as tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]
KEEP = MergeOptions(dtype="base")
SIZES = ((1, 8, 12, 7), (3, 12, 4, 5))
"""Rows, height and width of the latents, and length of the text; the graphs are traced and tried with others."""
TOLERANCE = 2e-5
"""Relative to the largest output: float32 sums in another order."""


@dataclass(kw_only=True)
class Case:
    """A merged pipeline and its graphs."""

    name: str
    base: Path
    component: str
    merged: Path
    exported: Exported
    straight: Exported
    """From base and adapter, without the merged checkpoint."""
    other: Exported
    """What another adapter makes of the base."""

    @cached_property
    def torch(self) -> Any:
        """The merged pipeline, as diffusers loads it."""
        from diffusers import DiffusionPipeline

        return DiffusionPipeline.from_pretrained(self.merged)

    def run(self, graph: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        session = onnxruntime.InferenceSession(self.exported.graphs[graph], providers=["CPUExecutionProvider"])
        names = [port.name for port in session.get_outputs()]
        found = session.run(names, {name: value.numpy() for name, value in inputs.items()})
        return {name: torch.from_numpy(value) for name, value in zip(names, found, strict=True)}


KINDS = {
    "sd": (tiny.stable_diffusion, "unet", tiny.UNET_TARGETS),
    "sdxl": (tiny.stable_diffusion_xl, "text_encoder_2", tiny.TEXT_TARGETS),
    "flux": (tiny.flux, "transformer", tiny.FLUX_TARGETS),
}


@pytest.fixture(
    scope="module",
    params=["sd", pytest.param("sdxl", marks=pytest.mark.nightly), pytest.param("flux", marks=pytest.mark.nightly)],
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    save, component, targets = KINDS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    base = save(folder / "base")
    from diffusers import DiffusionPipeline

    for name, own, rank in (("adapter", targets, 3), ("other", targets[:2], 2)):
        model = getattr(DiffusionPipeline.from_pretrained(base), component)
        tiny.train(model, folder / name, own, rank=rank, seed=rank)
    chosen = BindOptions(components=(component,))
    pipeline.merge(folder / "adapter", base=base, output=folder / "merged", merge_options=KEEP, bind_options=chosen)
    exported = pipeline.export(folder / "merged")  # here the cache is shared: the graphs are made once
    straight, other = (
        pipeline.export(
            adapters=folder / name,
            base=base,
            output=folder / f"{name}-onnx",
            merge_options=KEEP,
            bind_options=chosen,
        )
        for name in ("adapter", "other")
    )
    return Case(
        name=request.param,
        base=base,
        component=component,
        merged=folder / "merged",
        exported=exported,
        straight=straight,
        other=other,
    )


def assert_alike(found: Tensor, expected: Tensor, what: str) -> None:
    assert found.shape == expected.shape, what
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max(), what


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_the_denoiser_says_what_diffusers_says(case: Case, size: tuple[int, int, int, int]) -> None:
    n_rows, height, width, n_tokens = size
    if case.name == "flux":
        n_patches = height * width
        ids = torch.stack([torch.zeros(n_patches), *torch.randint(0, 9, (2, n_patches)).float()], dim=1)
        inputs = {
            "hidden_states": torch.randn(n_rows, n_patches, 16),
            "encoder_hidden_states": torch.randn(n_rows, n_tokens, tiny.WIDTH),
            "pooled_projections": torch.randn(n_rows, tiny.WIDTH),
            "timestep": torch.rand(n_rows),
            "img_ids": ids,
            "txt_ids": torch.zeros(n_tokens, 3),
        }
        expected = case.torch.transformer(**inputs).sample
        assert_alike(case.run("transformer", inputs)["out_hidden_states"], expected, "transformer")
        return
    is_xl = case.name == "sdxl"
    inputs = {
        "sample": torch.randn(n_rows, 4, height, width),
        "timestep": torch.tensor(13.0),
        "encoder_hidden_states": torch.randn(n_rows, n_tokens, tiny.WIDTH * (1 + is_xl)),
    }
    added = {"text_embeds": torch.randn(n_rows, tiny.WIDTH), "time_ids": torch.rand(n_rows, 6) * 32} if is_xl else {}
    expected = case.torch.unet(**inputs, added_cond_kwargs=added).sample
    assert_alike(case.run("unet", inputs | added)["out_sample"], expected, "unet")


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_both_halves_of_the_autoencoder_say_what_diffusers_says(case: Case, size: tuple[int, int, int, int]) -> None:
    n_rows, height, width, _ = size
    picture, latent = torch.randn(n_rows, 3, 2 * height, 2 * width), torch.randn(n_rows, 4, height, width)
    expected = case.torch.vae.encode(picture).latent_dist.parameters
    assert_alike(case.run("vae_encoder", {"sample": picture})["latent_parameters"], expected, "vae_encoder")
    expected = case.torch.vae.decode(latent).sample
    assert_alike(case.run("vae_decoder", {"latent_sample": latent})["sample"], expected, "vae_decoder")


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_text_encoders_say_what_transformers_says(case: Case, size: tuple[int, int, int, int]) -> None:
    n_rows, _, _, n_tokens = size
    ids = torch.randint(0, 60, (n_rows, n_tokens))
    ids[:, -2:] = 63  # the end of the text, where it is pooled
    for graph in (name for name in case.exported.graphs if name.startswith("text_encoder")):
        found = case.run(graph, {"input_ids": ids})
        expected = getattr(case.torch, graph)(ids, output_hidden_states=True)
        inner = {name for name in found if name.startswith("hidden_states.")}
        assert bool(inner) == (case.name == "sdxl")
        for name in found.keys() - inner:
            assert_alike(found[name], getattr(expected, name), f"{graph}: {name}")
        for name in inner:
            assert_alike(found[name], expected.hidden_states[int(name.partition(".")[2])], f"{graph}: {name}")


def test_the_folder_is_what_optimums_pipelines_read(case: Case) -> None:
    root = case.exported.root
    denoiser = "transformer" if case.name == "flux" else "unet"
    encoders = ["text_encoder"] if case.name == "sd" else ["text_encoder", "text_encoder_2"]
    graphs = {denoiser, "vae_encoder", "vae_decoder", *encoders}
    assert set(case.exported.graphs) == graphs
    for graph in graphs:
        assert (root / graph / "model.onnx").is_file()
        assert (root / graph / "config.json").is_file()
    for file in ("model_index.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"):
        assert (root / file).read_bytes() == (case.base / file).read_bytes()
    assert not (root / "config.json").exists()
    assert case.exported.record.options["layout"] == "diffusers"


def test_a_second_adapter_finds_the_graphs_in_the_cache(case: Case) -> None:
    assert case.other.was_cached
    for graph, path in case.other.graphs.items():
        assert path.read_bytes() == case.exported.graphs[graph].read_bytes()
        weights = [root / graph / "model.onnx.data" for root in (case.other.root, case.exported.root)]
        assert (weights[0].read_bytes() == weights[1].read_bytes()) == (graph != case.component)


def test_straight_from_base_and_adapter_it_is_the_same_export(case: Case) -> None:
    assert case.straight.was_cached
    assert case.straight.record.artifacts == case.exported.record.artifacts


def test_the_graphs_weights_replay(case: Case) -> None:
    source = CheckpointSource(open_checkpoint(case.merged), {})
    assert list(replay_export(source, case.exported.root)) == []
    base = CheckpointSource(open_checkpoint(case.base), {})
    assert all(fault.startswith(case.component) for fault in replay_export(base, case.exported.root))
    assert list(replay_export(base, case.exported.root))
