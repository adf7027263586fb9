"""``--layout genai``: onnxruntime-genai loads the folder, and generates what the merged model generates."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og
import pytest
import torch
from peft import LoraConfig

from lora_deploy.errors import ExportError
from lora_deploy.evidence.options import VerifyOptions
from lora_deploy.evidence.parity_report import ParityReport
from lora_deploy.evidence.verdict import Check, Verdict
from lora_deploy.export.execute import Exported
from lora_deploy.export.generate import greedy_tokens
from lora_deploy.export.options import ExportOptions
from lora_deploy.merge.options import MergeOptions
from lora_deploy.pipeline import export, merge, verify
from tests.parity.exports import contents, export_with, opened, reloaded, run
from tests.peer.models import llama
from tests.peer.trained import MEMORY_BYTES, Trained, train

pytestmark = [pytest.mark.slow]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    model = llama(hidden_size=32, head_dim=16, tie_word_embeddings=True, max_position_embeddings=64)
    model.generation_config.eos_token_id = [2, 5]
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    return train(model, config, tmp_path_factory.mktemp("genai"))


@pytest.fixture(scope="module")
def merged(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("genai-merged") / "merged"
    options = MergeOptions(dtype="float32", n_workers=1, memory_bytes=MEMORY_BYTES)
    merge(trained.adapter, base=trained.base, output=folder, merge_options=options)
    return folder


@pytest.fixture(scope="module")
def exported(merged: Path) -> Exported:
    return export_with(merged, layout="genai")


@pytest.fixture(scope="module")
def base(trained: Trained, exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    out = tmp_path_factory.mktemp("genai-base") / "base"
    return export(trained.base, output=out, export_options=exported_options())


def test_onnxruntime_genai_generates_what_the_merged_model_generates(exported: Exported, merged: Path) -> None:
    prompt = [7, 11, 23, 9, 30]
    model = og.Model(str(exported.root))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=20, min_length=20, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    found = list(map(int, generator.get_sequence(0)))
    torch_model = reloaded(merged)
    ids = torch.tensor([prompt])
    expected = torch_model.generate(
        ids, attention_mask=torch.ones_like(ids), max_length=20, min_length=20, do_sample=False, pad_token_id=0
    )[0].tolist()
    assert found == expected


def test_try_hears_what_onnxruntime_genai_says(exported: Exported, merged: Path) -> None:
    ids = torch.tensor([[7, 11, 23]])
    found = list(greedy_tokens(exported.root, exported.record, ids[0].tolist(), 9))
    options = {"max_length": 9, "do_sample": False, "pad_token_id": 0}
    expected = reloaded(merged).generate(ids, attention_mask=torch.ones_like(ids), **options)[0, 3:].tolist()
    assert found == expected


def test_the_models_own_special_tokens_are_in_its_configuration(exported: Exported) -> None:
    model = json.loads((exported.root / "genai_config.json").read_text())["model"]
    assert model["eos_token_id"] == [2, 5]
    assert model["pad_token_id"] == 2


def test_the_graph_is_the_bases_here_too(exported: Exported, base: Exported) -> None:
    assert base.was_cached
    assert contents(base.root, "*.onnx") == contents(exported.root, "*.onnx")
    assert contents(base.root, "*.data") != contents(exported.root, "*.data")


@pytest.fixture(scope="module", params=["int4", "int8-blockwise", "int8"])
def quantised(merged: Path, exported: Exported, request: pytest.FixtureRequest) -> Exported:
    return export_with(merged, layout="genai", quantize=request.param)


def test_onnxruntime_genai_generates_what_a_quantised_graph_says(quantised: Exported, exported: Exported) -> None:
    assert quantised.was_cached
    assert quantised.graphs["model"].read_bytes() != exported.graphs["model"].read_bytes()
    prompt = [7, 11, 23]
    found = list(greedy_tokens(quantised.root, quantised.record, prompt, 9))
    cache = {
        port.name: np.zeros([1, 2, 0, 16], np.float32)
        for port in opened(str(quantised.graphs["model"]), 0).get_inputs()
        if port.name.startswith("past")
    }
    for length in range(len(prompt), len(prompt) + len(found)):
        ids = np.array([(prompt + found)[:length]], np.int64)
        inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), **cache}
        logits = run(quantised.graphs["model"], inputs)["logits"][0, -1]
        assert float(logits.max() - logits[found[length - len(prompt)]]) < 0.05 * float(logits.max() - logits.min())


@pytest.mark.parametrize("is_ours", [True, False])
def test_an_adapter_merged_into_the_bases_export_gives_the_merged_models_export(
    trained: Trained, exported: Exported, base: Exported, tmp_path: Path, is_ours: bool
) -> None:
    """With our table, and without: then the builder's own names and the heads of its attention tell."""
    folder = tmp_path / "base"
    shutil.copytree(base.root, folder)
    if not is_ours:
        for name in ("binding_table.json", "export.json", "config.json"):
            (folder / name).unlink()
    options = MergeOptions(dtype="base", n_workers=1, memory_bytes=MEMORY_BYTES)
    done = merge(trained.adapter, base=folder, output=tmp_path / "out", merge_options=options)
    assert contents(done.root, "*.onnx", "*.data") == contents(exported.root, "*.onnx", "*.data")
    assert (done.root / "genai_config.json").read_bytes() == (base.root / "genai_config.json").read_bytes()
    assert og.Model(str(done.root)) is not None


def test_float16_on_the_cpu_is_refused(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="cannot generate in float16 on the CPU"):
        export(
            adapters=trained.adapter,
            base=trained.base,
            output=tmp_path / "half",
            export_options=exported_options(dtype="float16"),
        )


def exported_options(**options: Any) -> ExportOptions:
    return ExportOptions(layout="genai", **options)


@pytest.mark.usefixtures("in_one_process")
def test_batches_are_padded_where_the_layout_takes_it(exported: Exported, base: Exported, merged: Path) -> None:
    assert exported.root.parent == merged
    found = verify(merged, options=VerifyOptions(only=(Check.PARITY,), base_graph=base.root)).parity
    assert isinstance(found, ParityReport)
    assert found.verdict is Verdict.PASS, found.reason
    names = [subject.name for subject in found.subjects]
    assert "onnx decode over a cache, batch 4, right-padded" in names
    assert not found.notes, "no probe was left out"
