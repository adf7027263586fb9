"""Architectures that name, tie or store their weights in ways of their own: PEFT 0.21.2 on transformers 5.23."""

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
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    DistilBertForSequenceClassification,
    DistilBertModel,
    LlamaForSequenceClassification,
    ViTForImageClassification,
    ViTModel,
)

from lora_deploy.errors import IncompatibleAdapterError
from tests.peer.models import (
    bert,
    distilbert,
    gpt2,
    gpt_neox,
    image_and_text,
    images,
    llama,
    llava,
    opt,
    qwen2,
    speech,
    t5,
    token_ids,
    translation,
    vit,
    whisper,
)
from tests.peer.trained import (
    Inputs,
    assert_merges_as_trained,
    merge,
    randomize,
    save_base,
    tensors_of,
    train,
)


def _t5_with_a_head() -> nn.Module:
    """T5 1.1: both matrices in the file; transformers 5.23 sees that they differ and does not tie them."""
    model = t5(tie_word_embeddings=False)
    model.lm_head.weight = nn.Parameter(model.shared.weight.detach().flip(0).clone())
    return model


@dataclass(frozen=True)
class Architecture:
    name: str
    model: Callable[[], nn.Module]
    targets: list[str] | str
    inputs: Callable[[], Inputs] = token_ids
    options: dict[str, Any] = field(default_factory=dict)


ARCHITECTURES = [
    Architecture("GPT-2", gpt2, ["c_attn", "c_proj", "c_fc"]),
    Architecture("Qwen2", qwen2, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
    Architecture("Llama with every bias", lambda: llama(attention_bias=True, mlp_bias=True), ["o_proj", "down_proj"]),
    Architecture("GPT-NeoX", gpt_neox, ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "lm_head"]),
    Architecture("OPT", opt, ["q_proj", "v_proj", "out_proj", "fc1", "fc2", "project_in", "project_out"]),
    Architecture("T5", t5, ["q", "k", "v", "o", "wi", "wo"], translation),
    Architecture("T5 with a head of its own", _t5_with_a_head, ["q", "wo", "lm_head"], translation),
    Architecture("gated T5", lambda: t5(feed_forward_proj="gated-gelu"), ["wi_0", "wi_1", "wo"], translation),
    Architecture("BERT", lambda: bert(BertForMaskedLM), ["query", "key", "value", "dense"]),
    Architecture("DistilBERT", distilbert, ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"]),
    Architecture("ViT", vit, ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2", "projection"], images),
    Architecture("Whisper", whisper, ["q_proj", "v_proj", "out_proj", "fc1", "fc2"], speech),
    Architecture(
        "LLaVA",
        llava,
        r".*(self_attn\.[qkv]_proj|mlp\.(fc\d|\w+_proj)|multi_modal_projector\.linear_[12])",
        image_and_text,
    ),
    Architecture("LLaVA, text only", llava, r".*language_model.*\.(q|o)_proj", image_and_text),
]


@pytest.mark.parametrize("variant", [{}, {"use_dora": True}], ids=["plain", "DoRA"])
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.name)
def test_an_architecture_merges_to_what_peft_0_21_2_merges_and_computes_what_it_was_trained_to(
    architecture: Architecture, variant: dict[str, Any], tmp_path: Path
) -> None:
    config = LoraConfig(r=3, lora_alpha=5, target_modules=architecture.targets, **architecture.options, **variant)
    trained = train(architecture.model(), config, tmp_path)
    assert_merges_as_trained(trained, architecture.inputs(), tmp_path / "out")


def test_a_head_that_t5_always_ties_is_refused_since_no_checkpoint_unties_it_in_every_transformers(
    tmp_path: Path,
) -> None:
    trained = train(t5(), LoraConfig(r=2, target_modules=["lm_head"]), tmp_path)
    with pytest.raises(IncompatibleAdapterError, match=r"tie-unbreakable +lm_head.weight"):
        merge(trained.adapter, trained.base, tmp_path / "out")


@pytest.mark.parametrize("dtype", ["base", "float16", "bfloat16"])
def test_t5_keeps_the_layers_in_float32_that_transformers_5_23_keeps(dtype: str, tmp_path: Path) -> None:
    model = t5()
    trained = train(model, LoraConfig(r=2, target_modules=["q", "wo"]), tmp_path)
    merge(trained.adapter, trained.base, tmp_path / "out", dtype=dtype)
    kept = {name for name, t in tensors_of(tmp_path / "out").items() if t.dtype == torch.float32}
    names = set(tensors_of(trained.base))
    loaded = type(model).from_pretrained(trained.base, dtype=getattr(torch, dtype)) if dtype != "base" else model
    expected = {name for name, t in loaded.state_dict().items() if t.dtype == torch.float32}
    assert kept == expected & names
    assert len(kept) in {0, 4, len(names)}


@dataclass(frozen=True)
class Head:
    name: str
    base: Callable[[], nn.Module]
    cls: type[nn.Module]
    targets: list[str]
    task: str
    options: dict[str, Any] = field(default_factory=dict)
    inputs: Callable[[], Inputs] = token_ids
    ignored: frozenset[str] = frozenset()
    """What the base has and the model with this head has not."""


HEADS = [
    Head("BERT, classes of texts", bert, BertForSequenceClassification, ["query", "value"], "SEQ_CLS"),
    Head(
        "BERT, classes of tokens",
        bert,
        BertForTokenClassification,
        ["query", "value"],
        "TOKEN_CLS",
        ignored=frozenset({"bert.pooler.dense.bias", "bert.pooler.dense.weight"}),
    ),
    Head(
        "BERT with its masked head",
        lambda: bert(BertForMaskedLM),
        BertForSequenceClassification,
        ["query", "value"],
        "SEQ_CLS",
        {"modules_to_save": ["pooler"]},
        ignored=frozenset(
            f"cls.predictions.{name}"
            for name in (
                *("bias", "transform.dense.weight", "transform.dense.bias"),
                *("transform.LayerNorm.weight", "transform.LayerNorm.bias"),
            )
        ),
    ),
    Head(
        "DistilBERT",
        lambda: distilbert(DistilBertModel),
        DistilBertForSequenceClassification,
        ["q_lin", "lin1"],
        "SEQ_CLS",
        {"modules_to_save": ["pre_classifier", "classifier"]},
    ),
    Head(
        "Llama",
        lambda: llama(pad_token_id=0),
        LlamaForSequenceClassification,
        ["q_proj", "down_proj"],
        "SEQ_CLS",
        ignored=frozenset({"lm_head.weight"}),
    ),
    Head(
        "ViT",
        lambda: vit(ViTModel),
        ViTForImageClassification,
        ["q_proj"],
        None,
        {"modules_to_save": ["classifier"]},
        images,
        frozenset({"pooler.dense.weight", "pooler.dense.bias"}),
    ),
]


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.name)
def test_a_head_that_the_base_lacks_is_added_so_that_transformers_5_23_loads_what_peft_0_21_2_trained(
    head: Head, tmp_path: Path
) -> None:
    base = save_base(head.base(), tmp_path / "base")
    model = head.cls.from_pretrained(base, num_labels=5)
    for name, module in model.named_children():
        if name in {"classifier", "score", "pre_classifier"}:
            randomize(module)
    config = LoraConfig(r=3, target_modules=head.targets, task_type=head.task, **head.options)
    trained = train(model, config, tmp_path, base=base)
    assert_merges_as_trained(trained, head.inputs(), tmp_path / "out", ignored=head.ignored)
    merged_config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert merged_config["architectures"] == [head.cls.__name__]
