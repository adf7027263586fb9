"""Adapters with the names of older transformers, on bases as they are on disk; PEFT 0.21.2 trained the same factors."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertForSequenceClassification, LlamaForCausalLM, LlamaModel

from lora_deploy.errors import IncompatibleAdapterError
from tests.peer.models import bert, gpt_neox, llama, llava, token_ids, vit
from tests.peer.trained import (
    Trained,
    assert_rounded_once,
    assert_same_output,
    forward,
    merge,
    reload,
    save_base,
    train,
)

Renames = Sequence[tuple[str, str]]
LLAVA_TARGETS = r".*(self_attn\.[qkv]_proj|mlp\.(fc\d|\w+_proj)|multi_modal_projector\.linear_[12])"
VIT_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]


@dataclass(frozen=True)
class Older:
    name: str
    model: Callable[[], nn.Module]
    targets: list[str] | str
    renames: Renames
    """From the names of transformers 5.23 to those of the release that is meant."""


OLDER = [
    Older(
        "LLaVA of 4.51",
        llava,
        LLAVA_TARGETS,
        [
            (r"^model\.language_model\.", "language_model.model."),
            (r"^model\.vision_tower\.", "vision_tower.vision_model."),
            (r"^model\.multi_modal", "multi_modal"),
        ],
    ),
    Older("LLaVA of 4.52", llava, LLAVA_TARGETS, [(r"^model\.vision_tower\.", "model.vision_tower.vision_model.")]),
    Older(
        "ViT of 4",
        vit,
        VIT_TARGETS,
        [
            (r"\bvit\.layers\.", "vit.encoder.layer."),
            (r"\battention\.q_proj\b", "attention.attention.query"),
            (r"\battention\.k_proj\b", "attention.attention.key"),
            (r"\battention\.v_proj\b", "attention.attention.value"),
            (r"\battention\.o_proj\b", "attention.output.dense"),
            (r"\bmlp\.fc1\b", "intermediate.dense"),
            (r"\bmlp\.fc2\b", "output.dense"),
        ],
    ),
    Older("GPT-NeoX of 4", gpt_neox, ["query_key_value", "lm_head"], [(r"^lm_head\b", "embed_out")]),
]


def _rename(trained: Trained, renames: Renames, is_wanted: Callable[[str], bool] = lambda _: True) -> None:
    """Give the saved adapter the names of another release."""
    root, path = "base_model.model.", trained.adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    for key in list(tensors):
        name = key.removeprefix(root)
        for pattern, new in renames if is_wanted(name) else ():
            name = re.sub(pattern, new, name)
        tensors[root + name] = tensors.pop(key)
    save_file(tensors, path)


@pytest.mark.parametrize("case", OLDER, ids=lambda case: case.name)
def test_an_adapter_of_an_older_transformers_merges_to_what_peft_0_21_2_merges(case: Older, tmp_path: Path) -> None:
    trained = train(case.model(), LoraConfig(r=2, lora_alpha=5, target_modules=case.targets), tmp_path)
    before = set(load_file(trained.adapter / "adapter_model.safetensors"))
    _rename(trained, case.renames)
    assert len(before - set(load_file(trained.adapter / "adapter_model.safetensors"))) >= 2
    merge(trained.adapter, trained.base, tmp_path / "out")
    found = {name: t.float() for name, t in reload(trained.bare, tmp_path / "out").state_dict().items()}
    assert_rounded_once(found, trained.merged())


def test_names_of_two_releases_in_one_adapter_are_refused(tmp_path: Path) -> None:
    """The first layer's names would fit by one release, the second's by another: such a file was put together."""
    case = OLDER[2]
    trained = train(case.model(), LoraConfig(r=2, target_modules=["q_proj"]), tmp_path)
    _rename(trained, case.renames, lambda name: "layers.0." in name)
    with pytest.raises(IncompatibleAdapterError, match="mixed-names"):
        merge(trained.adapter, trained.base, tmp_path / "out")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_an_adapter_of_a_model_with_a_head_merges_into_a_base_saved_without_one(tied: bool, tmp_path: Path) -> None:
    whole = llama(tie_word_embeddings=tied)
    base = save_base(whole.model, tmp_path / "base")
    trained = train(whole, LoraConfig(r=2, target_modules=["q_proj", "up_proj"]), tmp_path, base=base)
    merge(trained.adapter, base, tmp_path / "out")
    core = reload(whole.model, tmp_path / "out")
    assert isinstance(core, LlamaModel)
    expected = {n.removeprefix("model."): t for n, t in trained.merged().items() if n != "lm_head.weight"}
    assert_rounded_once({name: t.float() for name, t in core.state_dict().items()}, expected)


def test_an_adapter_of_a_core_model_merges_into_a_base_saved_with_its_head(tmp_path: Path) -> None:
    whole = llama()
    base = save_base(whole, tmp_path / "base")
    trained = train(whole.model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"]), tmp_path, base=base)
    expected = trained.output(token_ids())
    merge(trained.adapter, base, tmp_path / "out")
    loaded = reload(whole, tmp_path / "out")
    assert isinstance(loaded, LlamaForCausalLM)
    assert_same_output(forward(loaded.model, token_ids()), expected, forward(trained.bare, token_ids()))


def test_gamma_and_beta_of_the_first_checkpoints_are_weight_and_bias(tmp_path: Path) -> None:
    model = bert(BertForSequenceClassification)
    config = LoraConfig(r=2, target_modules=["query"], modules_to_save=["LayerNorm", "classifier"])
    trained = train(model, config, tmp_path)
    path = trained.base / "model.safetensors"
    old = {
        re.sub(r"LayerNorm\.bias$", "LayerNorm.beta", re.sub(r"LayerNorm\.weight$", "LayerNorm.gamma", name)): t
        for name, t in load_file(path).items()
    }
    save_file(old, path, {"format": "pt"})
    merge(trained.adapter, trained.base, tmp_path / "out")
    loaded = reload(trained.bare, tmp_path / "out")
    assert_rounded_once({name: t.float() for name, t in loaded.state_dict().items()}, trained.merged())
