"""Encoders, classifiers with a trained head, encoder-decoders and vision models, exported from a merged checkpoint."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BertForSequenceClassification
from transformers.exporters import ExportedModel

from tests.parity.exports import Case, assert_close, contents, prepare, run, tokens
from tests.peer.models import bert, t5, vit

pytestmark = [pytest.mark.slow]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Case:
    model = bert(BertForSequenceClassification, num_labels=3)
    folder = tmp_path_factory.mktemp("bert")
    options = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier"], "init_lora_weights": False}
    return prepare(model, ["query", "value", "intermediate.dense"], folder, **options)


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("vit")
    return prepare(vit(), ["q_proj", "v_proj"], folder, modules_to_save=["classifier"], init_lora_weights=False)


@pytest.fixture(scope="module")
def translator(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return prepare(t5(), ["q", "v", "wi"], tmp_path_factory.mktemp("t5"), init_lora_weights=False)


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
