"""What a card shows first: how weights and graphs are loaded."""

from __future__ import annotations

from typing import Any

from lora_deploy.export.record import ExportRecord, RecordedGraph
from lora_deploy.release.loading import snippets

DECODE = RecordedGraph(file="decode.onnx", canonical="c", inputs=(), outputs=())
WEIGHTS = ("config.json", "model.safetensors")
LLAMA = {"architectures": ["LlamaForCausalLM"]}


def export(**options: Any) -> ExportRecord:
    return ExportRecord.model_construct(options=options, graphs={"decode": DECODE})


def shown(*arguments: Any) -> dict[str, str]:
    return dict(snippets(*arguments))


def test_a_checkpoint_is_loaded_by_its_class() -> None:
    found = shown(LLAMA, WEIGHTS, {})
    assert list(found) == ["transformers"]
    assert 'LlamaForCausalLM.from_pretrained(".")' in found["transformers"]


def test_a_pipeline_is_loaded_by_diffusers() -> None:
    index = {"_class_name": "FluxPipeline", "_diffusers_version": "0.39.0"}
    found = shown(index, ("model_index.json", "transformer/diffusion_pytorch_model.safetensors"), {})
    assert list(found) == ["diffusers"]
    assert 'FluxPipeline.from_pretrained(".")' in found["diffusers"]


def test_graphs_without_weights_are_not_shown_to_transformers() -> None:
    found = shown(LLAMA, ("config.json", "model.onnx", "model.onnx.data"), {})
    assert list(found) == ["onnxruntime"]
    assert 'InferenceSession("model.onnx")' in found["onnxruntime"]


def test_graphs_are_named_by_their_folder_and_without_one_where_they_are_the_release() -> None:
    assert 'InferenceSession("onnx/decode.onnx")' in shown(LLAMA, WEIGHTS, {"onnx": export()})["onnxruntime"]
    assert 'InferenceSession("decode.onnx")' in shown(LLAMA, (), {".": export()})["onnxruntime"]
    assert 'Model("g")' in shown(LLAMA, WEIGHTS, {"g": export(layout="genai")})["onnxruntime-genai"]


def test_a_config_without_a_class_shows_nothing() -> None:
    assert shown({}, WEIGHTS, {}) == {}
