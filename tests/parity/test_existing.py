"""Adapters merged into exports of other tools: what the same tool makes of the merged checkpoint, bit for bit.

optimum-onnx exports with ``torch.onnx.export(dynamo=False)``, which is what is called here: optimum-onnx 0.1.0 itself
needs an older transformers, and was compared by hand (docs/export.md).
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from peft import LoraConfig
from transformers import BertForSequenceClassification
from transformers.exporters import OnnxExporter
from transformers.exporters.configs import OnnxConfig

from lora_deploy.evidence.latency import LatencyReport
from lora_deploy.evidence.options import VerifyOptions
from lora_deploy.evidence.outcome import NotApplicable
from lora_deploy.evidence.verdict import Check, Verdict
from lora_deploy.export.genai import _write_tokenizer
from lora_deploy.merge.options import MergeOptions
from lora_deploy.pipeline import merge, verify
from tests.parity.exports import TOLERANCE, reloaded, run, tokens
from tests.peer.models import bert, gpt2, llama
from tests.peer.trained import MEMORY_BYTES, Trained, train

pytestmark = [pytest.mark.slow]

LIMITS: dict[str, Any] = {"n_workers": 1, "memory_bytes": MEMORY_BYTES}
Make = Callable[[Any, Path], None]


def tied_llama() -> Any:
    return llama(hidden_size=32, intermediate_size=48, head_dim=8, tie_word_embeddings=True)


def classifier() -> Any:
    return bert(BertForSequenceClassification, num_labels=3)


MODELS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "llama": (tied_llama, {"target_modules": "all-linear"}),
    "bert": (classifier, {"target_modules": ["query", "dense"], "modules_to_save": ["classifier"]}),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "use_dora": True}),
}


def inputs_of(model: Any) -> dict[str, Any]:
    batch: dict[str, Any] = tokens(2, 9, n_padded=2)
    return batch if model.config.model_type == "bert" else {**batch, "use_cache": False}


def by_torchscript(model: Any, out: Path) -> None:
    """As optimum exports."""
    out.mkdir()
    axes = {name: {0: "batch", 1: "sequence"} for name in ("input_ids", "attention_mask")}
    model.config.use_cache = False
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (),
            out / "model.onnx",
            kwargs=inputs_of(model),
            dynamo=False,
            input_names=[*axes],
            output_names=["logits"],
            dynamic_axes=axes,
        )
    model.config.save_pretrained(out)


def by_transformers(model: Any, out: Path, *, optimize: bool = True) -> None:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        config = OnnxConfig(dynamic=True, optimize=optimize)
        OnnxExporter().export(model, inputs_of(model), config=config).save_pretrained(out)


def by_transformers_unoptimised(model: Any, out: Path) -> None:
    by_transformers(model, out, optimize=False)


def by_genai(model: Any, out: Path) -> None:
    source = out.with_name(f"{out.name}-source")
    model.save_pretrained(source)
    _write_tokenizer(source)
    options = ["-i", str(source), "-o", str(out), "-p", "fp32", "-e", "cpu", "-c", str(out / "cache")]
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", *options]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})


def compared(name: str, make: Make, folder: Path) -> tuple[Trained, Path]:
    """Merge into the base's export, and compare with the export of the merged checkpoint; give what was merged."""
    make_model, config = MODELS[name]
    trained = train(make_model(), LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **config), folder)
    merge(
        trained.adapter, base=trained.base, output=folder / "m", merge_options=MergeOptions(dtype="float32", **LIMITS)
    )
    make(reloaded(trained.base), folder / "base-onnx")
    make(reloaded(folder / "m"), folder / "merged-onnx")
    options = MergeOptions(dtype="base", **LIMITS)
    done = merge(trained.adapter, base=folder / "base-onnx", output=folder / "out", merge_options=options)
    assert initializers(done.root) == initializers(folder / "merged-onnx")
    assert initializers(done.root) != initializers(folder / "base-onnx")
    found = verify(done.root, options=VerifyOptions(only=(Check.REPLAY,)), merge_options=options)
    assert found.verdict is Verdict.PASS
    return trained, done.root


def initializers(folder: Path) -> dict[str, bytes]:
    model = onnx.load(folder / "model.onnx")
    return {tensor.name: numpy_helper.to_array(tensor).tobytes() for tensor in model.graph.initializer}


@pytest.mark.parametrize("name", MODELS)
def test_an_export_by_torchscript_becomes_that_of_the_merged_checkpoint(name: str, tmp_path: Path) -> None:
    trained, merged = compared(name, by_torchscript, tmp_path)
    assert (merged / "model.onnx").read_bytes() == (tmp_path / "merged-onnx" / "model.onnx").read_bytes()
    batch = tokens(2, 7, n_padded=2, seed=11)
    found = run(merged / "model.onnx", {**batch, "logits_to_keep": torch.arange(7)})["logits"]
    with torch.no_grad():
        expected = trained.model(**batch).logits
        base = trained.bare(**batch).logits
    read = batch["attention_mask"].bool() if found.dim() == 3 else slice(None)
    assert (found - expected)[read].abs().max() <= TOLERANCE * expected.abs().max()
    assert (base - expected)[read].abs().max() > 0.02 * expected.abs().max()


def test_equal_graphs_and_replayed_weights_prove_the_latency(tmp_path: Path) -> None:
    _, merged = compared("bert", by_torchscript, tmp_path)
    options = VerifyOptions(seconds=1.0)
    found = verify(merged, options=options, merge_options=MergeOptions(**LIMITS))
    assert isinstance(found.parity, NotApplicable)
    assert isinstance(found.latency, LatencyReport)
    assert found.latency.proof.is_equal
    assert found.latency.measurements


@pytest.mark.nightly
@pytest.mark.parametrize("make", [by_transformers, by_transformers_unoptimised])
@pytest.mark.parametrize("name", MODELS)
def test_an_export_by_transformers_becomes_that_of_the_merged_checkpoint(name: str, make: Make, tmp_path: Path) -> None:
    compared(name, make, tmp_path)


@pytest.mark.nightly
def test_an_export_by_genai_becomes_that_of_the_merged_checkpoint(tmp_path: Path) -> None:
    compared("llama", by_genai, tmp_path)
