"""Tied tensors: what training changed on one side only is untied, what it changed alike stays tied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_deploy.adapter import ModuleUpdate, Orientation
from lora_deploy.checkpoint import Checkpoint
from lora_deploy.errors import IncompatibleAdapterError, Severity
from lora_deploy.updates.replacement import Replacement
from lora_deploy.updates.token_rows import TokenRows
from lora_deploy.validate import bind
from tests.builders import adapter_of, low_rank, make_checkpoint, merged_values, module_update

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TIED = {"model_type": "llama", "tie_word_embeddings": True, "architectures": ["LlamaForCausalLM"]}
UNTIED_EDIT = {"tie_word_embeddings": False}
V, D = 5, 3


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(V, D)


def tied(folder: Path, weight: Tensor, config: dict[str, Any] | None = None, **more: Tensor) -> Checkpoint:
    return make_checkpoint(folder, {EMBED: weight, **more}, config or TIED)


def stored(target: str, update: Any) -> ModuleUpdate:
    return module_update(target, update, Orientation.STORED)


@pytest.mark.parametrize("changed", [EMBED, HEAD])
@pytest.mark.parametrize("head_is_stored", [False, True])
def test_a_change_of_one_side_unties_both(tmp_path: Path, weight: Tensor, changed: str, head_is_stored: bool) -> None:
    more = {HEAD: weight.clone()} if head_is_stored else {}
    update = low_rank(V, D)
    binding = bind([adapter_of(stored(changed, update))], tied(tmp_path, weight, **more))
    merged = merged_values(binding)
    other = HEAD if changed == EMBED else EMBED
    assert torch.allclose(merged[changed], weight.double() + update.delta())
    assert torch.equal(merged[other], weight.double())
    assert binding.config_edits == UNTIED_EDIT
    assert binding.outputs[HEAD] == (HEAD if head_is_stored else EMBED)
    assert [finding.code for finding in binding.findings] == ["tied-target"]


def test_different_changes_of_both_sides_untie_them(tmp_path: Path, weight: Tensor) -> None:
    one, two = low_rank(V, D), low_rank(V, D)
    binding = bind([adapter_of(stored(EMBED, one), stored(HEAD, two))], tied(tmp_path, weight))
    merged = merged_values(binding)
    assert torch.allclose(merged[EMBED], weight.double() + one.delta())
    assert torch.allclose(merged[HEAD], weight.double() + two.delta())
    assert binding.config_edits == UNTIED_EDIT


@pytest.mark.parametrize("head_is_stored", [False, True])
def test_equal_changes_of_both_sides_apply_once_and_stay_tied(
    tmp_path: Path, weight: Tensor, head_is_stored: bool
) -> None:
    more = {HEAD: weight.clone()} if head_is_stored else {}
    update = low_rank(V, D)
    adapter = adapter_of(stored(EMBED, update), module_update(HEAD, update))
    binding = bind([adapter], tied(tmp_path, weight, **more))
    assert binding.config_edits == {}
    merged = merged_values(binding)
    assert all(torch.allclose(tensor, weight.double() + update.delta()) for tensor in merged.values())
    assert set(merged) == {EMBED, *more}
    used = {key for updates in binding.updates.values() for bound in updates for key in bound.keys}
    assert used == {key for update in adapter.updates for key in update.keys}


def test_an_update_that_was_trained_tied_changes_the_shared_matrix(tmp_path: Path, weight: Tensor) -> None:
    adapter = adapter_of(stored(EMBED, low_rank(V, D)), config={"ensure_weight_tying": True})
    binding = bind([adapter], tied(tmp_path, weight))
    assert binding.config_edits == {}
    assert [*binding.outputs] == [EMBED]


@pytest.mark.parametrize("head_is_stored", [False, True])
def test_token_rows_change_both_sides(tmp_path: Path, weight: Tensor, head_is_stored: bool) -> None:
    more = {HEAD: weight.clone()} if head_is_stored else {}
    rows = TokenRows(indices=(1,), values=torch.ones(1, D))
    binding = bind([adapter_of(stored(EMBED, rows))], tied(tmp_path, weight, **more))
    assert binding.config_edits == {}
    merged = merged_values(binding)
    assert set(merged) == {EMBED, *more}
    assert all(tensor[1].tolist() == [1.0] * D for tensor in merged.values())


def test_token_rows_reach_a_head_that_another_update_unties(tmp_path: Path, weight: Tensor) -> None:
    rows = TokenRows(indices=(1,), values=torch.ones(1, D))
    update = low_rank(V, D)
    merged = merged_values(
        bind([adapter_of(stored(EMBED, rows)), adapter_of(stored(HEAD, update))], tied(tmp_path, weight))
    )
    assert merged[EMBED][1].tolist() == [1.0] * D
    assert torch.allclose(merged[HEAD][1], torch.ones(D).double() + update.delta()[1])


def test_a_replaced_embedding_of_the_same_size_leaves_the_head_as_it_was(tmp_path: Path, weight: Tensor) -> None:
    new = torch.randn(V, D)
    binding = bind([adapter_of(stored(EMBED, Replacement(values=new)))], tied(tmp_path, weight))
    merged = merged_values(binding)
    assert torch.equal(merged[EMBED], new.double())
    assert torch.equal(merged[HEAD], weight.double())
    assert binding.config_edits == UNTIED_EDIT


def test_an_embedding_and_head_replaced_alike_stay_tied(tmp_path: Path, weight: Tensor) -> None:
    new = torch.randn(V, D)
    updates = (stored(EMBED, Replacement(values=new)), stored(HEAD, Replacement(values=new.clone())))
    binding = bind([adapter_of(*updates)], tied(tmp_path, weight))
    assert binding.config_edits == {}
    assert [*binding.outputs] == [EMBED]


def test_a_resized_embedding_resizes_the_head_that_shares_it(tmp_path: Path, weight: Tensor) -> None:
    new = torch.randn(V + 2, D)
    config = TIED | {"vocab_size": V}
    binding = bind([adapter_of(stored(EMBED, Replacement(values=new)))], tied(tmp_path, weight, config))
    assert binding.config_edits == {"vocab_size": V + 2}
    assert [*binding.outputs] == [EMBED]


def test_a_change_on_top_of_a_resized_embedding_unties_the_resized_head(tmp_path: Path, weight: Tensor) -> None:
    new, update = torch.randn(V + 2, D), low_rank(V + 2, D)
    adapter = adapter_of(stored(EMBED, Replacement(values=new)), stored(EMBED, update))
    merged = merged_values(bind([adapter], tied(tmp_path, weight)))
    assert torch.allclose(merged[EMBED], new.double() + update.delta())
    assert torch.equal(merged[HEAD], new.double())


def test_stored_tensors_that_differ_are_not_tied_whatever_the_flag_says(tmp_path: Path, weight: Tensor) -> None:
    update = low_rank(V, D)
    binding = bind([adapter_of(stored(EMBED, update))], tied(tmp_path, weight, **{HEAD: torch.randn(V, D)}))
    assert binding.config_edits == {}
    assert [*binding.updates] == [EMBED]


def test_a_base_without_a_head_gets_none(tmp_path: Path, weight: Tensor) -> None:
    config = TIED | {"architectures": ["LlamaModel"]}
    binding = bind([adapter_of(stored(EMBED, low_rank(V, D)))], tied(tmp_path, weight, config))
    assert [*binding.outputs] == [EMBED]
    assert binding.config_edits == {}


def test_nested_flags_are_edited_too(tmp_path: Path, weight: Tensor) -> None:
    name = "language_model.model.embed_tokens.weight"
    config = {"model_type": "llava", "text_config": {"model_type": "llama", "tie_word_embeddings": True}}
    checkpoint = make_checkpoint(tmp_path, {name: weight}, config)
    for head in ("lm_head.weight", "language_model.lm_head.weight"):
        binding = bind([adapter_of(stored(head, low_rank(V, D)))], checkpoint)
        assert binding.config_edits == {"tie_word_embeddings": False, "text_config.tie_word_embeddings": False}
        assert [*binding.outputs] == [name, "language_model.lm_head.weight"]


def test_a_bert_head_is_untied_under_its_own_name(tmp_path: Path, weight: Tensor) -> None:
    name = "bert.embeddings.word_embeddings.weight"
    tensors = {name: weight, "cls.predictions.bias": torch.zeros(V)}
    checkpoint = make_checkpoint(tmp_path, tensors, {"model_type": "bert", "architectures": ["BertForMaskedLM"]})
    binding = bind([adapter_of(stored(name, low_rank(V, D)))], checkpoint)
    assert binding.outputs["cls.predictions.decoder.weight"] == name


@pytest.mark.parametrize("changed", ["shared.weight", "encoder.embed_tokens.weight", "lm_head.weight"])
def test_what_t5_always_shares_cannot_be_changed_on_one_side(tmp_path: Path, weight: Tensor, changed: str) -> None:
    checkpoint = make_checkpoint(tmp_path, {"shared.weight": weight}, {"model_type": "t5"})
    with pytest.raises(IncompatibleAdapterError) as caught:
        bind([adapter_of(stored(changed, low_rank(V, D)))], checkpoint)
    found = [finding.code for finding in caught.value.findings if finding.severity is Severity.ERROR]
    assert set(found) == {"tie-unbreakable"}


def test_a_t5_head_of_its_own_is_an_ordinary_tensor(tmp_path: Path, weight: Tensor) -> None:
    config = {"model_type": "t5", "tie_word_embeddings": False}
    checkpoint = make_checkpoint(tmp_path, {"shared.weight": weight, HEAD: torch.randn(V, D)}, config)
    assert [*bind([adapter_of(stored(HEAD, low_rank(V, D)))], checkpoint).updates] == [HEAD]
