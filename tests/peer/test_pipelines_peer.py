"""Diffusion pipelines: adapters of components, merged and compared with PEFT's own merge, loaded by diffusers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_deploy import pipeline
from lora_deploy.artifact import sha256_of
from lora_deploy.errors import IncompatibleAdapterError, LoraDeployError, RecipeError
from lora_deploy.evidence.options import VerifyOptions
from lora_deploy.evidence.verdict import Check, Verdict
from lora_deploy.merge.options import MergeOptions
from lora_deploy.merge.record import read_record
from lora_deploy.validate import BindOptions
from tests import pipelines as tiny

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
KEEP = MergeOptions(dtype="base")


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tiny.stable_diffusion(tmp_path_factory.mktemp("pipelines") / "sd")
    path = root / "vae" / "diffusion_pytorch_model.safetensors"  # a file that no writer of ours would write alike
    save_file(dict(reversed(load_file(path).items())), path, {"format": "pt", "origin": "elsewhere"})
    return root


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.stable_diffusion_xl(tmp_path_factory.mktemp("pipelines") / "sdxl")


@pytest.fixture(scope="module")
def unet_adapter(sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "style"
    tiny.train(load(sd, "unet"), folder, tiny.UNET_TARGETS)
    return folder


def load(root: Path, component: str) -> Any:
    """A component as its library loads it."""
    import diffusers
    import transformers

    library, name = json.loads((root / "model_index.json").read_text())[component]
    cls = getattr({"diffusers": diffusers, "transformers": transformers}[library], name)
    return cls.from_pretrained(root / component).eval()


def by_peft(root: Path, component: str, *adapters: Path) -> Mapping[str, Tensor]:
    """What PEFT makes of a component, computed in float64 and rounded once."""
    from peft import PeftModel

    model = load(root, component).double()
    for adapter in adapters:
        model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return {name: tensor.float() for name, tensor in model.state_dict().items()}


def stored(folder: Path) -> Mapping[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_near(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() <= expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=2e-7, atol=1e-9, msg=name)


def files(root: Path) -> Mapping[str, str]:
    found = (path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): sha256_of(path) for path in found}


def test_an_adapter_of_the_unet_finds_it_and_merges_as_peft_does(sd: Path, unet_adapter: Path, tmp_path: Path) -> None:
    assert pipeline.validate(unet_adapter, base=sd).findings == ()
    merged = pipeline.merge(unet_adapter, base=sd, output=tmp_path / "out", merge_options=KEEP)
    found, base = stored(tmp_path / "out" / "unet"), stored(sd / "unet")
    assert_near(found, by_peft(sd, "unet", unet_adapter))
    changed = {name for name in base if not torch.equal(base[name], found[name])}
    kinds = {base[name].shape[2:] for name in changed}
    assert kinds == {(), (1, 1), (3, 3)}
    assert {f"unet/{name}" for name in changed} == set(merged.record.tensors)


def test_what_no_adapter_touches_is_the_same_file(sd: Path, unet_adapter: Path, tmp_path: Path) -> None:
    pipeline.merge(unet_adapter, base=sd, output=tmp_path / "out", merge_options=KEEP)
    before, after = files(sd), files(tmp_path / "out")
    assert before.keys() == after.keys() - {"merge.json"}
    assert [name for name in before if before[name] != after[name]] == ["unet/diffusion_pytorch_model.safetensors"]


def test_diffusers_runs_the_merged_pipeline_as_the_unmerged_one(sd: Path, unet_adapter: Path, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline
    from peft import PeftModel

    pipeline.merge(unet_adapter, base=sd, output=tmp_path / "out", merge_options=KEEP)
    unmerged = DiffusionPipeline.from_pretrained(sd)
    unmerged.unet = PeftModel.from_pretrained(unmerged.unet, str(unet_adapter)).eval()
    images = [image_of(p) for p in (DiffusionPipeline.from_pretrained(tmp_path / "out"), unmerged)]
    plain = image_of(DiffusionPipeline.from_pretrained(sd))
    assert (images[0] - images[1]).abs().max() < 1e-4
    assert (images[0] - plain).abs().max() > 1e-2


def image_of(loaded: Any) -> Tensor:
    loaded.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    return loaded(  # type: ignore[no-any-return]
        "a cat", num_inference_steps=2, height=32, width=32, generator=generator, output_type="pt"
    ).images


def test_replay_finds_the_merged_pipeline_right_and_a_changed_component_wrong(
    sd: Path, unet_adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    pipeline.merge(unet_adapter, base=sd, output=out, merge_options=KEEP)
    only = VerifyOptions(only=(Check.REPLAY,))
    assert pipeline.verify(out, options=only).verdict is Verdict.PASS
    path = out / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    assert pipeline.verify(out, options=only).verdict is Verdict.FAIL


def test_a_foreign_merge_of_the_pipeline_replays(sd: Path, unet_adapter: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    shutil.copytree(sd, tmp_path / "out")
    merged = PeftModel.from_pretrained(load(sd, "unet"), str(unet_adapter)).merge_and_unload()
    merged.save_pretrained(tmp_path / "out" / "unet")
    found = pipeline.verify(
        tmp_path / "out", adapters=unet_adapter, base=sd, options=VerifyOptions(only=(Check.REPLAY,))
    )
    assert found.verdict is Verdict.PASS


def test_one_adapter_a_component_in_one_merge(sd: Path, unet_adapter: Path, tmp_path: Path) -> None:
    tiny.train(load(sd, "text_encoder"), tmp_path / "words", tiny.TEXT_TARGETS, use_rslora=True)
    adapters = [tmp_path / "words", unet_adapter]
    options = BindOptions(weights=(0.5, 2.0))
    merged = pipeline.merge(adapters, base=sd, output=tmp_path / "out", merge_options=KEEP, bind_options=options)
    owners = {name.partition("/")[0]: {u.adapter for u in t.updates} for name, t in merged.record.tensors.items()}
    assert owners == {"text_encoder": {0}, "unet": {1}}
    for component, adapter, weight in (("text_encoder", adapters[0], 0.5), ("unet", adapters[1], 2.0)):
        base, full = stored(sd / component), by_peft(sd, component, adapter)
        scaled = {name: base[name].double() + weight * (full[name].double() - base[name]) for name in base}
        found = {name: tensor.double() for name, tensor in stored(tmp_path / "out" / component).items()}
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, scaled[name], rtol=1e-6, atol=2e-7, msg=name)


@pytest.fixture(scope="module")
def text_adapter(sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "words"
    tiny.train(load(sdxl, "text_encoder_2"), folder, tiny.TEXT_TARGETS)
    return folder


def test_an_adapter_that_fits_two_text_encoders_needs_the_name(sdxl: Path, text_adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="text_encoder, text_encoder_2") as caught:
        pipeline.validate(text_adapter, base=sdxl)
    assert "--component" in (caught.value.hint or "")
    options = BindOptions(components=("text_encoder_2",))
    pipeline.merge(text_adapter, base=sdxl, output=tmp_path / "out", merge_options=KEEP, bind_options=options)
    assert_near(stored(tmp_path / "out" / "text_encoder_2"), by_peft(sdxl, "text_encoder_2", text_adapter))
    assert files(tmp_path / "out" / "text_encoder") == files(sdxl / "text_encoder")
    assert pipeline.verify(tmp_path / "out", options=VerifyOptions(only=(Check.REPLAY,))).verdict is Verdict.PASS


def test_a_pattern_may_say_which_component_is_meant(sdxl: Path, text_adapter: Path) -> None:
    binding = pipeline.validate(text_adapter, base=sdxl, bind_options=BindOptions(include=("text_encoder/*",)))
    assert {name.partition("/")[0] for name in binding.updates} == {"text_encoder"}


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        (BindOptions(components=("unit",)), RecipeError, "no such component"),
        (BindOptions(components=("unet", "vae")), RecipeError, "found 2 components for 1 adapters"),
        (BindOptions(components=("vae",)), IncompatibleAdapterError, "vae/"),
        (BindOptions(tokenizer="adapter"), RecipeError, "keeps its own tokenizers"),
        (BindOptions(variant="fp16"), RecipeError, "no component has the variant 'fp16'"),
    ],
)
def test_a_component_that_is_not_there_or_does_not_fit(
    sd: Path, unet_adapter: Path, options: BindOptions, error: type[LoraDeployError], said: str
) -> None:
    with pytest.raises(error, match=said):
        pipeline.validate(unet_adapter, base=sd, bind_options=options)


def test_an_adapter_of_another_unet_is_refused_with_the_nearest_components_misfits(sd: Path, tmp_path: Path) -> None:
    tiny.train(tiny.unet(1, cross_attention_dim=24), tmp_path / "other", ("to_q", "to_k"))
    with pytest.raises(IncompatibleAdapterError, match=r"shape-mismatch .*unet/.*to_k") as caught:
        pipeline.validate(tmp_path / "other", base=sd)
    assert {finding.code for finding in caught.value.findings if finding.severity == "error"} == {"shape-mismatch"}


def test_flux_and_its_t5_merge_as_peft_does(tmp_path: Path) -> None:
    base = tiny.flux(tmp_path / "flux")
    tiny.train(load(base, "transformer"), tmp_path / "style", tiny.FLUX_TARGETS)
    tiny.train(load(base, "text_encoder_2"), tmp_path / "words", tiny.T5_TARGETS)
    adapters = [tmp_path / "style", tmp_path / "words"]
    pipeline.merge(adapters, base=base, output=tmp_path / "out", merge_options=KEEP)
    for component, adapter in zip(("transformer", "text_encoder_2"), adapters, strict=True):
        assert_near(stored(tmp_path / "out" / component), by_peft(base, component, adapter))
    half = pipeline.plan(adapters, base=base)
    kept = {tensor.spec.name.rsplit(".", 2)[-2] for tensor in half.tensors if tensor.spec.dtype.long_name == "float32"}
    assert kept == {"wo"}  # T5 keeps it, and nothing of another component is called so
    assert "float16-activations" in {finding.code for finding in half.findings}
    assert "torch_dtype" not in half.config["transformer"]
    assert "float16" in {half.config["text_encoder"].get(key) for key in ("dtype", "torch_dtype")}


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A pipeline in float32 and float16, both in several files."""
    from diffusers import DiffusionPipeline

    root = tiny.stable_diffusion(tmp_path / "sharded", max_shard_size="60KB")
    loaded = DiffusionPipeline.from_pretrained(root).to(torch.float16)
    loaded.save_pretrained(root, variant="fp16", max_shard_size="60KB")
    return root


def test_shards_keep_their_names_and_variants_lose_theirs(sharded: Path, unet_adapter: Path, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    names = {path.name for path in sharded.glob("*/*.safetensors")}
    assert any("fp16" in name for name in names)
    assert len(list((sharded / "unet").glob("*.safetensors"))) > 2
    pipeline.merge(unet_adapter, base=sharded, output=tmp_path / "plain", merge_options=KEEP)
    half = BindOptions(variant="fp16")
    record = pipeline.merge(
        unet_adapter, base=sharded, output=tmp_path / "half", merge_options=KEEP, bind_options=half
    ).record
    assert record.options["bind"]["variant"] == "fp16"
    for out, dtype in ((tmp_path / "plain", torch.float32), (tmp_path / "half", torch.float16)):
        assert not any("fp16" in path.name for path in out.rglob("*"))
        assert {tensor.dtype for c in ("unet", "vae") for tensor in stored(out / c).values()} == {dtype}
        DiffusionPipeline.from_pretrained(out, torch_dtype=dtype)
        assert pipeline.verify(out, options=VerifyOptions(only=(Check.REPLAY,))).verdict is Verdict.PASS
    before, after = files(sharded / "vae"), files(tmp_path / "plain" / "vae")
    assert {name: before[name] for name in after if name.endswith(".safetensors")}.items() <= after.items()


def test_an_interrupted_merge_resumes_behind_the_finished_components(
    sd: Path, unet_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_deploy.merge import execute

    out, original, done = tmp_path / "out", execute._merge_shard, list[str]()

    def stop_at_second(plan: Any, shard: Any, *rest: Any) -> Any:
        if done:
            raise KeyboardInterrupt
        done.append(shard.file)
        return original(plan, shard, *rest)

    monkeypatch.setattr(execute, "_merge_shard", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        pipeline.merge(unet_adapter, base=sd, output=out, merge_options=KEEP)
    again: list[str] = []
    monkeypatch.setattr(
        execute, "_merge_shard", lambda plan, shard, *rest: again.append(shard.file) or original(plan, shard, *rest)
    )
    pipeline.merge(unet_adapter, base=sd, output=out, merge_options=KEEP)
    assert len(done) == 1
    assert sorted(done + again) == [file for file in sorted(files(sd)) if file.endswith(".safetensors")]
    assert read_record(out).artifacts
