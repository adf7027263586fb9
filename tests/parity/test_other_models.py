"""Encoders, classifiers with a trained head, encoder-decoders and vision models, exported from a merged checkpoint."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from transformers import BertForSequenceClassification
from transformers.exporters import ExportedModel
from transformers.exporters.configs import OnnxConfig
from transformers.exporters.exporter_onnx import OnnxExporter

from lora_deploy.export.binding_table import BindingTable
from lora_deploy.export.canonical import first_difference
from lora_deploy.export.drawn import external, initializers, values_of, without_metadata
from lora_deploy.export.generate import Decoder
from lora_deploy.export.loading import quiet
from lora_deploy.export.options import ExportOptions
from lora_deploy.export.stages import stages_of, varying
from lora_deploy.merge.options import MergeOptions
from lora_deploy.pipeline import export
from tests.parity.exports import (
    Case,
    assert_close,
    contents,
    export_with,
    merged_into_export,
    prepare,
    run,
    tokens,
)
from tests.peer.models import bert
from tests.peer.trained import MEMORY_BYTES

pytestmark = [pytest.mark.slow]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Case:
    model = bert(BertForSequenceClassification, num_labels=3)
    folder = tmp_path_factory.mktemp("bert")
    options = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier"], "init_lora_weights": False}
    case = prepare(model, ["query", "value", "intermediate.dense"], folder, **options)
    case.shared = export_with(case.merged, storage="shared")
    case.half = export(
        adapters=case.trained.adapter,
        base=case.trained.base,
        output=folder / "half",
        merge_options=MergeOptions(n_workers=1, memory_bytes=MEMORY_BYTES),
        export_options=ExportOptions(dtype="float16"),
    )
    return case


@torch.no_grad()
def _logits(model: Any, **inputs: Any) -> torch.Tensor:
    logits: torch.Tensor = model(**inputs).logits
    return logits


@pytest.mark.parametrize(("n_rows", "n_tokens"), [(1, 4), (2, 9), (5, 13)])
def test_a_classifier_with_a_trained_head_says_what_the_merged_model_says(
    classifier: Case, n_rows: int, n_tokens: int
) -> None:
    inputs = tokens(n_rows, n_tokens)
    inputs["attention_mask"][0, -1] = 0
    inputs["token_type_ids"] = (torch.arange(n_tokens) > n_tokens // 2).long().expand(n_rows, -1).contiguous()
    found, expected = run(classifier.exported.graphs["model"], inputs)["logits"], _logits(classifier.model, **inputs)
    assert_close(found, expected)
    assert (_logits(classifier.base, **inputs) - expected).abs().max() > 0.02 * expected.abs().max()


def test_a_trained_head_is_in_the_weights_and_not_in_the_graph(classifier: Case) -> None:
    graphs, weights = contents(classifier.exported.root, "*.onnx"), contents(classifier.exported.root, "*.data")
    assert contents(classifier.base_export.root, "*.onnx") == graphs
    assert contents(classifier.base_export.root, "*.data") != weights
    assert contents(classifier.straight.root, "*.onnx", "*.data") == graphs | weights


def test_an_independent_export_of_the_merged_model_is_the_same_graph_with_the_same_bytes(
    classifier: Case, tmp_path: Path
) -> None:
    """The exporter alone, on the merged model itself: no synthetic weights, no table, no cache."""
    stage = next(iter(stages_of(classifier.model)))
    config = OnnxConfig(dynamic=True, dynamic_shapes=varying(stage.inputs, stage.others), ort_fusions="cpu")
    with quiet():
        independent = OnnxExporter().export(stage.module, dict(stage.inputs), config).program
    ours = onnx.load(str(classifier.exported.graphs["model"]))
    bound = (classifier.exported.root / "binding_table.json").read_text()
    slots = BindingTable.model_validate_json(bound).components["model"].slots
    # In order, because names are counted: those of folded values depend on how often the graph was copied.
    for tensor, value in zip(ours.graph.initializer, initializers(independent).values(), strict=True):
        assert values_of(value).numpy().tobytes() == numpy_helper.to_array(tensor).tobytes(), tensor.name
        if tensor.name in slots:
            value.const_value = external(value, "elsewhere", 0, value.const_value.nbytes)
    path = tmp_path / "independent.onnx"
    path.write_bytes(without_metadata(independent))
    assert first_difference(path, classifier.exported.graphs["model"]) is None
    assert path.stat().st_size > 1000


def test_shared_weights_say_the_same_and_are_not_copied(classifier: Case) -> None:
    inputs = {**tokens(2, 6), "token_type_ids": torch.zeros(2, 6, dtype=torch.long)}
    shared = classifier.shared
    assert shared.record.shared_share == 1
    assert (shared.root / "model.onnx.data").stat().st_size == 0
    assert_close(run(shared.graphs["model"], inputs)["logits"], _logits(classifier.model, **inputs))


def test_float16_runs_on_the_cpu_and_says_so(classifier: Case) -> None:
    inputs = {**tokens(2, 6), "token_type_ids": torch.zeros(2, 6, dtype=torch.long)}
    half = classifier.half
    assert [finding.code for finding in half.record.findings] == ["float16-casts"]
    found, expected = run(half.graphs["model"], inputs)["logits"], _logits(classifier.model, **inputs)
    assert found.dtype == torch.float16
    assert_close(found, expected, tolerance=1e-2)


def test_transformers_calls_a_single_graph_as_it_calls_the_model(classifier: Case) -> None:
    loaded = ExportedModel.from_pretrained(classifier.exported.root, device="cpu")
    inputs = {**tokens(2, 6), "token_type_ids": torch.zeros(2, 6, dtype=torch.long)}
    assert_close(loaded(**inputs).logits, _logits(classifier.model, **inputs))
    assert loaded.config.num_labels == 3


@pytest.mark.parametrize("n_rows", [1, 4])
def test_an_image_classifier_says_what_the_merged_model_says(vision: Case, n_rows: int) -> None:
    pixels = torch.randn(n_rows, 3, 8, 8)
    found, expected = (
        run(vision.exported.graphs["model"], {"pixel_values": pixels}),
        _logits(vision.model, pixel_values=pixels),
    )
    assert_close(found["logits"], expected)
    assert (_logits(vision.base, pixel_values=pixels) - expected).abs().max() > 0.02 * expected.abs().max()


def _graph_inputs(encoded: torch.Tensor, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {"encoder_outputs.last_hidden_state": encoded, "attention_mask": batch["attention_mask"]}


@pytest.mark.parametrize(("n_rows", "n_tokens"), [(1, 4), (3, 11)])
def test_an_encoder_decoder_answers_token_by_token_as_the_merged_model_does(
    translator: Case, n_rows: int, n_tokens: int
) -> None:
    graphs = translator.exported.graphs
    assert set(graphs) == {"encoder", "prefill", "decode"}
    batch = tokens(n_rows, n_tokens)
    batch["attention_mask"][0, -1] = 0
    encoded = run(graphs["encoder"], batch)["last_hidden_state"]
    answer = tokens(n_rows, 3, seed=9)["input_ids"]
    state = run(graphs["prefill"], {**_graph_inputs(encoded, batch), "decoder_input_ids": answer})
    assert_close(state["logits"], _logits(translator.model, **batch, decoder_input_ids=answer))
    for step in range(2):
        token = tokens(n_rows, 1, seed=20 + step)["input_ids"]
        answer = torch.cat([answer, token], 1)
        inputs = {**_graph_inputs(encoded, batch), **state, "decoder_input_ids": token}
        state = state | run(graphs["decode"], inputs)
        expected = _logits(translator.model, **batch, decoder_input_ids=answer)[:, -1]
        assert_close(state["logits"][:, -1], expected)


def test_an_encoder_decoder_answers_prompts_as_the_merged_model_does(translator: Case) -> None:
    decoder = Decoder(translator.exported.root, translator.exported.record, n_threads=1)
    options = {"max_new_tokens": 9, "do_sample": False, "num_beams": 1}
    said = set()
    for seed in range(8):
        prompt = torch.randint(4, 36, (1, 12), generator=torch.Generator().manual_seed(seed))
        found = list(itertools.islice(decoder.tokens(prompt[0].tolist()), 9))
        mask = torch.ones_like(prompt)
        expected = translator.model.generate(prompt, attention_mask=mask, **options)[0, 1:].tolist()
        assert found[: len(expected)] == expected, "up to the end's mark, where transformers stops"
        said |= set(found)
    assert len(said) > 2


@pytest.mark.parametrize("name", ["classifier", "translator"])
def test_an_adapter_merged_into_the_bases_export_gives_the_merged_models_export(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    case = request.getfixturevalue(name)
    folder = merged_into_export(case, tmp_path / "grafted")
    assert contents(folder, "*.onnx", "*.data") == contents(case.exported.root, "*.onnx", "*.data")
