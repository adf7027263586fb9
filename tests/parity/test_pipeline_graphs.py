"""Graphs of tiny diffusion pipelines say what diffusers says, on sizes that nobody traced; and evidence sees faults."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_deploy import pipeline
from lora_deploy.checkpoint import open_checkpoint
from lora_deploy.errors import InputError
from lora_deploy.evidence.component import Component
from lora_deploy.evidence.dossier import Evidence
from lora_deploy.evidence.latency import LatencyReport
from lora_deploy.evidence.options import VerifyOptions
from lora_deploy.evidence.outcome import Outcome
from lora_deploy.evidence.parity_report import ParityReport
from lora_deploy.evidence.picture import draw, heard, load_pipeline
from lora_deploy.evidence.replay import ReplayReport
from lora_deploy.evidence.verdict import Check, Verdict
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


@pytest.fixture(autouse=True)
def _empty_cache() -> None:
    """Have tests share the graphs that the module's fixtures made: making them again would take most of the time."""


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
    "sd3": (tiny.stable_diffusion_3, "transformer", tiny.SD3_TARGETS),
}


@pytest.fixture(
    scope="module",
    params=["sd", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("sdxl", "flux", "sd3"))],
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
    if case.name == "sd3":
        inputs = {
            "hidden_states": torch.randn(n_rows, 4, height, width),
            "encoder_hidden_states": torch.randn(n_rows, n_tokens, 2 * tiny.WIDTH),
            "pooled_projections": torch.randn(n_rows, 2 * tiny.WIDTH),
            "timestep": 999 * torch.rand(n_rows),
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
        assert bool(inner) == (case.name in {"sdxl", "sd3"})
        for name in found.keys() - inner:
            assert_alike(found[name], getattr(expected, name), f"{graph}: {name}")
        for name in inner:
            assert_alike(found[name], expected.hidden_states[int(name.partition(".")[2])], f"{graph}: {name}")


def test_the_folder_is_what_optimums_pipelines_read(case: Case) -> None:
    root = case.exported.root
    denoiser = "transformer" if case.name in {"flux", "sd3"} else "unet"
    encoders = ["text_encoder", "text_encoder_2", "text_encoder_3"]
    encoders = encoders[: {"sd": 1, "sdxl": 2, "flux": 2, "sd3": 3}[case.name]]
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


# ------------------------------------------------------------------------------------------------------------- evidence


def checked(folder: Path, *only: Check, **options: Any) -> Evidence:
    return pipeline.verify(folder, options=VerifyOptions(only=only, seconds=2, **options))


def parity_of(found: Evidence) -> ParityReport:
    assert isinstance(found.parity, ParityReport)
    return found.parity


def by_name(report: ParityReport) -> dict[str, Verdict]:
    return {subject.name: subject.verdict for subject in report.subjects}


def copied(case: Case, folder: Path) -> Path:
    shutil.copytree(case.merged, folder)
    return folder


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], component: str) -> Path:
    """Change the weights of a merged component."""
    (path,) = (folder / component).glob("*.safetensors")
    save_file(change(load_file(path)), path, {"format": "pt"})
    return folder


def test_weights_outputs_and_graphs_are_proven(case: Case) -> None:
    found = checked(case.merged)
    report = parity_of(found)
    assert isinstance(found.replay, ReplayReport)
    assert found.replay.verdict is Verdict.PASS, found.replay.faults
    assert report.verdict is Verdict.PASS, report.reason
    assert report.is_independent
    assert by_name(report) == {f"{case.component}, reloaded": Verdict.PASS, f"onnx {case.component}": Verdict.PASS}
    assert {share.name for s in report.subjects[1:] for bound in s.tolerances for share in bound.shares} == {
        "merge",
        "export",
    }
    changed = [power for power in report.power if power.effect]
    assert changed
    assert all(power.is_enough for power in changed)
    assert all(power.output.startswith(f"{case.component}: ") for power in report.power)
    pictures = {picture.name: picture for picture in report.pictures}
    assert set(pictures) == {"base", "unmerged", "merged", "onnx"}
    assert pictures["unmerged"].relative_l2 == 0
    off = {name: picture.relative_l2 or 0 for name, picture in pictures.items()}
    assert max(off["merged"], off["onnx"]) < 1e-3 < off["base"]
    assert all(base64.b64decode(picture.png).startswith(b"\x89PNG") for picture in report.pictures)
    assert isinstance(found.latency, LatencyReport)
    assert found.latency.proof.is_equal, found.latency.proof.reason
    assert found.latency.proof.reason.count("canonical digest") == len(case.exported.graphs)
    assert found.latency.measurements
    json.loads((case.merged / "evidence.json").read_text())


def test_denoisers_are_probed_early_midway_and_late(case: Case) -> None:
    if case.component.startswith("text"):
        pytest.skip("the adapter is on a text encoder")
    found = load_pipeline(case.base)
    with heard(found, [Component(name=case.component, graph=case.component)]) as calls:
        draw(found)
    steps = [float(inputs["timestep"].flatten()[0]) for inputs in calls[case.component].spread]
    assert len(steps) == 3
    assert steps == sorted(steps, reverse=True)
    assert len(calls[case.component].inputs) == 4


@pytest.fixture(scope="module")
def deltas(case: Case) -> dict[str, Tensor]:
    (merged,), (base,) = ((root / case.component).glob("*.safetensors") for root in (case.merged, case.base))
    before, after = load_file(base), load_file(merged)
    return {name: after[name] - before[name] for name in after if not torch.equal(after[name], before[name])}


@pytest.mark.parametrize("fault", ["one module was not merged", "the scale is a tenth too large", "one is transposed"])
def test_a_fault_in_the_merged_weights_is_seen(
    case: Case, deltas: dict[str, Tensor], fault: str, tmp_path: Path
) -> None:
    one = next(name for name, delta in deltas.items() if delta.ndim == 2 and delta.shape[0] == delta.shape[1])

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if fault.startswith("the scale"):
            return {name: value + 0.1 * deltas.get(name, torch.tensor(0.0)) for name, value in tensors.items()}
        delta = deltas[one]
        return tensors | {one: tensors[one] - delta + (delta.T if fault.endswith("transposed") else 0 * delta)}

    folder = rewritten(copied(case, tmp_path / "merged"), change, case.component)
    shutil.rmtree(folder / "onnx")
    report = parity_of(checked(folder, Check.PARITY))
    assert report.verdict is Verdict.FAIL
    assert by_name(report) == {f"{case.component}, reloaded": Verdict.FAIL}


def test_graphs_that_read_the_bases_weights_are_seen(case: Case, tmp_path: Path) -> None:
    folder = copied(case, tmp_path / "merged")
    other = case.other.root / case.component / "model.onnx.data"
    shutil.copyfile(other, folder / "onnx" / case.component / "model.onnx.data")
    found = checked(folder)
    report = parity_of(found)
    assert by_name(report) == {f"{case.component}, reloaded": Verdict.PASS, f"onnx {case.component}": Verdict.FAIL}
    assert isinstance(found.replay, ReplayReport)
    assert [fault.outcome for fault in found.replay.faults] == [Outcome.WRONG_GRAPH] * len(found.replay.faults)
    assert isinstance(found.latency, LatencyReport)
    assert found.latency.proof.is_equal is False


def test_an_export_without_a_merged_checkpoint_is_proven(case: Case) -> None:
    found = checked(case.straight.root)
    assert found.verdict is Verdict.PASS, parity_of(found).reason
    assert by_name(parity_of(found)) == {f"onnx {case.component}": Verdict.PASS}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.stable_diffusion(tmp_path_factory.mktemp("two") / "base")


def adapted(base: Path, folder: Path, component: str, targets: Sequence[str], share: float = 1.0) -> Path:
    from diffusers import DiffusionPipeline

    tiny.train(getattr(DiffusionPipeline.from_pretrained(base), component), folder, targets)
    path = folder / "adapter_model.safetensors"
    save_file({name: value * share**0.5 for name, value in load_file(path).items()}, path)
    return folder


def test_every_component_with_an_adapter_needs_power_of_its_own(base: Path, tmp_path: Path) -> None:
    strong = adapted(base, tmp_path / "strong", "unet", tiny.UNET_TARGETS)
    weak = adapted(base, tmp_path / "weak", "text_encoder", tiny.TEXT_TARGETS, share=1e-5)
    merged = pipeline.merge(
        [strong, weak],
        base=base,
        output=tmp_path / "merged",
        bind_options=BindOptions(components=("unet", "text_encoder")),
        merge_options=MergeOptions(dtype="float16"),
    )
    report = parity_of(checked(merged.root, Check.PARITY))
    assert set(by_name(report)) == {"unet, reloaded", "text_encoder, reloaded"}
    assert report.verdict is Verdict.INCONCLUSIVE
    assert "text_encoder" in report.reason


def test_the_users_prompts_are_probes_too(base: Path, tmp_path: Path) -> None:
    adapter = adapted(base, tmp_path / "adapter", "unet", tiny.UNET_TARGETS)
    merged = pipeline.merge(adapter, base=base, output=tmp_path / "merged", merge_options=KEEP)
    (tmp_path / "mine.jsonl").write_text('{"prompt": "a boat"}\n')
    report = parity_of(checked(merged.root, Check.PARITY, probes=tmp_path / "mine.jsonl"))
    assert report.verdict is Verdict.PASS, report.reason
    assert sum("prompt 2" in name for name in report.probes) == 3
    (tmp_path / "mine.jsonl").write_text('{"prompt": "a boat"}\n{"text": "a boat"}\n')
    with pytest.raises(InputError, match=r"mine.jsonl:2: found text, expected prompt"):
        checked(merged.root, Check.PARITY, probes=tmp_path / "mine.jsonl")


@pytest.mark.nightly
def test_half_precision_keeps_the_fraction_of_timesteps(base: Path, tmp_path: Path) -> None:
    adapter = adapted(base, tmp_path / "adapter", "unet", tiny.UNET_TARGETS)
    merged = pipeline.merge(adapter, base=base, output=tmp_path / "m", merge_options=MergeOptions(dtype="float16"))
    exported = pipeline.export(merged.root)
    session = onnxruntime.InferenceSession(exported.graphs["unet"], providers=["CPUExecutionProvider"])
    types = {port.name: port.type for port in session.get_inputs()}
    assert types == {
        "sample": "tensor(float16)",
        "timestep": "tensor(float)",
        "encoder_hidden_states": "tensor(float16)",
    }
    assert checked(merged.root).verdict is Verdict.PASS
