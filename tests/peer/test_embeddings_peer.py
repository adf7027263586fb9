"""Embeddings and heads, shared or not: adapted, saved whole, resized, row by row. The peer is PEFT 0.21.2.

Where model and head share a matrix, PEFT's merge changes both although its forward pass adapted one (or adapted it
once): its merged weights are wrong there, and only the unmerged forward pass says what was trained.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn

from tests.peer.models import VOCABULARY, gpt2, gpt_neox, llama, opt, t5, token_ids, translation
from tests.peer.trained import (
    Inputs,
    assert_merges_as_trained,
    peft_advice_unheard,
    save_base,
    tensors_of,
    train,
)


def _tied() -> nn.Module:
    return llama(tie_word_embeddings=True)


@dataclass(frozen=True)
class Shared:
    """An adapter of a matrix that may be shared."""

    name: str
    model: Callable[[], nn.Module]
    targets: list[str]
    options: dict[str, Any] = field(default_factory=dict)
    peft_is_right: bool = True
    """Whether PEFT's merge computes what its forward pass does."""
    stays_tied: bool = False
    inputs: Callable[[], Inputs] = token_ids


ROWS = [7, 0, 3]
CASES = [
    Shared("untied, embedding", llama, ["embed_tokens", "q_proj"]),
    Shared("untied, head", llama, ["lm_head", "q_proj"]),
    Shared("untied, both", llama, ["embed_tokens", "lm_head"]),
    Shared("untied, both with magnitudes", llama, ["embed_tokens", "lm_head"], {"use_dora": True}),
    Shared("GPT-NeoX, both", gpt_neox, ["embed_in", "lm_head"]),
    Shared("tied, embedding", _tied, ["embed_tokens", "q_proj"], peft_is_right=False),
    Shared("tied, head", _tied, ["lm_head", "q_proj"], peft_is_right=False),
    Shared("tied, both", _tied, ["embed_tokens", "lm_head"], peft_is_right=False),
    Shared("tied, embedding with magnitudes", _tied, ["embed_tokens"], {"use_dora": True}, peft_is_right=False),
    Shared("tied, head with magnitudes", _tied, ["lm_head"], {"use_dora": True}, peft_is_right=False),
    Shared(
        "tied, kept tied from the embedding",
        _tied,
        ["embed_tokens", "q_proj"],
        {"ensure_weight_tying": True},
        peft_is_right=False,
        stays_tied=True,
    ),
    Shared("GPT-2, embedding", gpt2, ["wte"], peft_is_right=False),
    Shared("GPT-2, places", gpt2, ["wpe"], stays_tied=True),
    Shared("GPT-2, head", gpt2, ["lm_head"], peft_is_right=False),
    Shared("OPT, embedding", opt, ["embed_tokens"], peft_is_right=False),
    Shared("OPT, head", opt, ["lm_head"], peft_is_right=False),
    Shared("tied, embedding saved", _tied, ["q_proj"], {"modules_to_save": ["embed_tokens"]}),
    Shared("tied, head saved", _tied, ["q_proj"], {"modules_to_save": ["lm_head"]}),
    Shared("tied, both saved", _tied, ["q_proj"], {"modules_to_save": ["embed_tokens", "lm_head"]}),
    Shared(
        "tied, saved and kept tied",
        _tied,
        ["q_proj"],
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        stays_tied=True,
    ),
    Shared("untied, rows", llama, ["q_proj"], {"trainable_token_indices": ROWS}),
    Shared("untied, rows by name", llama, ["q_proj"], {"trainable_token_indices": {"embed_tokens": ROWS}}),
    Shared(
        "untied, rows of both",
        llama,
        ["q_proj"],
        {"trainable_token_indices": {"embed_tokens": ROWS, "lm_head": [2, 7]}},
    ),
    Shared("tied, rows", _tied, ["q_proj"], {"trainable_token_indices": ROWS}, stays_tied=True),
    Shared(
        "tied, rows by name",
        _tied,
        ["q_proj"],
        {"trainable_token_indices": {"embed_tokens": ROWS}},
        stays_tied=True,
    ),
    Shared(
        "tied, the same rows of both",
        _tied,
        ["q_proj"],
        {"trainable_token_indices": {"embed_tokens": ROWS, "lm_head": ROWS}, "ensure_weight_tying": True},
        stays_tied=True,
    ),
    Shared("GPT-2, rows", gpt2, ["c_attn"], {"trainable_token_indices": {"wte": ROWS}}, stays_tied=True),
    Shared("T5, rows", t5, ["q"], {"trainable_token_indices": {"shared": ROWS}}, stays_tied=True, inputs=translation),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_shared_matrix_computes_what_peft_0_21_2_was_trained_to(case: Shared, tmp_path: Path) -> None:
    config = LoraConfig(r=3, lora_alpha=5, target_modules=case.targets, **case.options)
    model = case.model()
    trained = train(model, config, tmp_path)
    assert_merges_as_trained(trained, case.inputs(), tmp_path / "out", weights=case.peft_is_right)

    base, merged = tensors_of(trained.base), tensors_of(tmp_path / "out")
    was_tied = model.config.tie_word_embeddings
    edited = json.loads((tmp_path / "out" / "config.json").read_text())
    assert edited["tie_word_embeddings"] is (was_tied and case.stays_tied)
    assert len(merged) - len(base) == (was_tied and not case.stays_tied)


@pytest.mark.parametrize(
    ("tied", "targets", "options"),
    [
        (False, ["q_proj"], {}),
        (True, ["q_proj"], {}),
        (False, ["q_proj", "embed_tokens", "lm_head"], {}),
        (False, ["q_proj"], {"modules_to_save": ["embed_tokens", "lm_head"]}),
        (False, ["q_proj"], {"trainable_token_indices": [VOCABULARY, VOCABULARY + 1]}),
        (True, ["q_proj"], {"trainable_token_indices": [VOCABULARY, VOCABULARY + 1]}),
    ],
)
@pytest.mark.parametrize("n_new", [3, -4], ids=["more tokens", "fewer tokens"])
def test_a_vocabulary_that_was_resized_before_training_is_resized_in_the_merged_model_as_peft_0_21_2_had_it(
    n_new: int, tied: bool, targets: list[str], options: dict[str, Any], tmp_path: Path
) -> None:
    if n_new < 0 and "trainable_token_indices" in options:
        options = {"trainable_token_indices": ROWS}
    model = llama(tie_word_embeddings=tied)
    base = save_base(model, tmp_path / "base")
    model = type(model).from_pretrained(base)
    with peft_advice_unheard():
        model.resize_token_embeddings(VOCABULARY + n_new)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=targets, **options)
    trained = train(model, config, tmp_path, base=base, save_embedding_layers=True)
    inputs = {"input_ids": torch.arange(VOCABULARY + n_new)[None]}
    assert_merges_as_trained(trained, inputs, tmp_path / "out")
    edited = json.loads((tmp_path / "out" / "config.json").read_text())
    assert edited["vocab_size"] == VOCABULARY + n_new
    assert edited["tie_word_embeddings"] is tied
