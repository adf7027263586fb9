"""Decoders with a cache: the graphs exported from a merged checkpoint say what the merged model says.

Prefill and decode, batch 1 and left-padded batches, over caches that torch and onnxruntime have filled.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.exporters import ExportedModel

from lora_deploy.artifact import sha256_of
from lora_deploy.export.canonical import canonical_digest
from lora_deploy.export.generate import Decoder
from lora_deploy.export.record import read_record
from tests.parity.exports import Case, assert_close, contents, merged_into_export, prepare, run, tokens
from tests.peer.models import VOCABULARY, gpt2, llama
from tests.peer.trained import randomize

pytestmark = [pytest.mark.slow]


def qwen3() -> Any:
    """Norms on queries and keys, a tied head."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    return randomize(Qwen3ForCausalLM(Qwen3Config(vocab_size=VOCABULARY, **sizes, **heads)))


def llama_for_gqa() -> Any:
    """Heads of a size that onnxruntime's grouped-query attention takes."""
    return llama(hidden_size=32, head_dim=8)


DECODERS: dict[str, tuple[Callable[[], Any], Any]] = {
    "llama": (llama_for_gqa, "all-linear"),
    "qwen3": (qwen3, ["q_proj", "v_proj", "down_proj"]),
    "gpt2": (gpt2, ["c_attn", "c_proj", "c_fc"]),
}
BATCHES = {"one": (1, 5, 0), "one token": (1, 1, 0), "padded": (3, 7, 3)}


@pytest.fixture(scope="module", params=DECODERS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    make, targets = DECODERS[request.param]
    return prepare(make(), targets, tmp_path_factory.mktemp(request.param), init_lora_weights=False)


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def test_nothing_is_left_unfused(case: Case) -> None:
    assert "unfused" not in {finding.code for finding in case.exported.record.findings}
    if "num_key_value_heads" in (case.exported.root / "config.json").read_text():
        for graph in case.exported.graphs.values():
            operators = [node.op_type for node in onnx.load(str(graph), load_external_data=False).graph.node]
            assert operators.count("GroupQueryAttention") == 2


def _prefill(case: Case, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return run(case.exported.graphs["prefill"], {**batch, "position_ids": _positions(batch["attention_mask"])})


def _is_read(batch: dict[str, Tensor]) -> Tensor:
    return batch["attention_mask"].bool()


@torch.no_grad()
def _expected(model: Any, batch: dict[str, Tensor]) -> Tensor:
    logits: Tensor = model(**batch, position_ids=_positions(batch["attention_mask"])).logits
    return logits


@pytest.mark.parametrize("size", BATCHES.values(), ids=BATCHES)
def test_prefill_says_what_the_merged_model_says_and_not_what_the_base_says(
    case: Case, size: tuple[int, int, int]
) -> None:
    batch = tokens(size[0], size[1], n_padded=size[2])
    found, expected = _prefill(case, batch)["logits"], _expected(case.model, batch)
    read = _is_read(batch)
    assert_close(found[read], expected[read])
    base = _expected(case.base, batch)[read]
    assert (base - expected[read]).abs().max() > 0.02 * expected[read].abs().max()


@pytest.mark.parametrize("size", BATCHES.values(), ids=BATCHES)
def test_decoding_over_a_filled_cache_says_what_the_merged_model_says(case: Case, size: tuple[int, int, int]) -> None:
    batch = tokens(size[0], size[1], n_padded=size[2])
    state = _prefill(case, batch)
    for step in range(3):
        token = tokens(size[0], 1, seed=10 + step)["input_ids"]
        ids = torch.cat([batch["input_ids"], token], 1)
        batch = {"input_ids": ids, "attention_mask": torch.cat([batch["attention_mask"], torch.ones_like(token)], 1)}
        positions = _positions(batch["attention_mask"])[:, -1:]
        inputs = {"input_ids": token, "attention_mask": batch["attention_mask"], "position_ids": positions}
        state = run(case.exported.graphs["decode"], inputs | state)
        assert_close(state["logits"][:, -1], _expected(case.model, batch)[:, -1])


def test_the_graph_is_the_bases_byte_for_byte_and_only_weights_differ(case: Case) -> None:
    base, graphs = case.base_export, contents(case.exported.root, "*.onnx")
    assert base.was_cached
    assert set(graphs) == {"prefill.onnx", "decode.onnx"}
    assert contents(base.root, "*.onnx") == graphs
    assert contents(base.root, "*.data") != contents(case.exported.root, "*.data")
    for name, graph in case.exported.record.graphs.items():
        digest = canonical_digest(case.exported.root / graph.file)
        assert digest == graph.canonical == base.record.graphs[name].canonical


def test_base_and_adapter_give_the_same_files_without_a_merged_checkpoint(case: Case) -> None:
    others = ("export.json",)  # which says where the weights came from
    found, expected = contents(case.straight.root), contents(case.exported.root)
    assert {name: content for name, content in found.items() if name not in others} == {
        name: content for name, content in expected.items() if name not in others
    }


def test_an_adapter_merged_into_the_bases_export_gives_the_merged_models_export(case: Case, tmp_path: Path) -> None:
    folder = merged_into_export(case, tmp_path / "grafted")
    patterns = ("*.onnx", "*.data", "binding_table.json")
    assert contents(folder, *patterns) == contents(case.exported.root, *patterns)
    record = read_record(folder)
    assert {file.path for file in record.artifacts} == {file.path for file in case.base_export.record.artifacts}
    assert all(sha256_of(folder / file.path) == file.sha256 for file in record.artifacts)
    assert record.digest != case.base_export.record.digest
    assert ExportedModel.from_pretrained(folder) is not None


def test_try_hears_the_tokens_that_the_merged_model_generates(case: Case) -> None:
    prompt = [7, 11, 23, 9]
    decoder = Decoder(case.exported.root, case.exported.record, n_threads=1)
    found = list(itertools.islice(decoder.tokens(prompt), 8))
    ids = torch.tensor([prompt])
    for token in found:
        expected = _expected(case.model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})[0, -1]
        assert expected[token] >= expected.max() - 1e-4 * expected.abs().max()
        ids = torch.cat([ids, torch.tensor([[token]])], 1)


def test_transformers_loads_the_folder_and_runs_it(case: Case) -> None:
    loaded = ExportedModel.from_pretrained(case.exported.root, device="cpu")
    batch = tokens(2, 6, n_padded=2)
    inputs = {**batch, "position_ids": _positions(batch["attention_mask"])}
    output = loaded.runners["prefill"](**inputs)
    assert_close(output.logits[_is_read(batch)], _expected(case.model, batch)[_is_read(batch)])
    token = torch.tensor([[7], [8]])
    mask = torch.cat([batch["attention_mask"], torch.ones_like(token)], 1)
    more = {"input_ids": torch.cat([batch["input_ids"], token], 1), "attention_mask": mask}
    step = loaded.runners["decode"](
        input_ids=token,
        attention_mask=mask,
        position_ids=_positions(mask)[:, -1:],
        past_key_values=output.past_key_values,
    )
    assert_close(step.logits[:, -1], _expected(case.model, more)[:, -1])
