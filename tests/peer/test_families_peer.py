"""Every family that the product names, really trained: two steps by PEFT 0.21.2, saved by it, merged by us, reloaded.

The unmerged model's output is the merged model's. Families that only this test has run always; those whose linear
layers all are adapted by the sweep over every architecture run nightly.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn

from lora_deploy.errors import IncompatibleAdapterError
from tests.peer.models import bert, clip, image_and_text, images, llava, speech, token_ids, translation, vit, whisper
from tests.peer.small import of_class
from tests.peer.trained import (
    Inputs,
    assert_merges_as_trained,
    assert_rounded_once,
    merge,
    reload,
    tensors_of,
    train,
)
from tests.peer.vision_language import (
    clip_classifier,
    gemma3,
    idefics,
    idefics2,
    idefics3,
    paligemma,
    qwen2_5_vl,
    qwen2_vl,
    seen,
    seen_by_idefics,
    seen_by_qwen,
    siglip,
    siglip_classifier,
    text_and_images,
)

NAMED_NOWHERE_ELSE = [
    ("CLIP", clip, text_and_images, ["q_proj", "out_proj", "fc1", "visual_projection", "text_projection"]),
    ("CLIP, images alone", clip_classifier, images, ["k_proj", "fc2", "classifier"]),
    ("SigLIP", siglip, text_and_images, r".*(v_proj|fc1|text_model\.head)"),
    ("SigLIP, images alone", siglip_classifier, images, ["q_proj", "fc2", "classifier"]),
    ("Qwen2-VL", qwen2_vl, seen_by_qwen, ["q_proj", "down_proj", "qkv", "fc1", "lm_head", "proj"]),
    ("Qwen2.5-VL", qwen2_5_vl, seen_by_qwen, ["o_proj", "up_proj", "qkv", "proj"]),
    ("Idefics", idefics, seen_by_idefics, ["q_proj", "gate_proj", "fc1"]),
    ("Idefics2", idefics2, lambda: seen(2, several=True), ["q_proj", "down_proj", "fc2"]),
    ("Idefics3", idefics3, lambda: seen(1, several=True), ["q_proj", "proj", "fc1", "lm_head"]),
    ("Gemma 3 with images", gemma3, lambda: seen(4, types=True), ["q_proj", "down_proj", "fc1"]),
    ("PaliGemma", paligemma, lambda: seen(4, types=True), ["q_proj", "down_proj", "fc1", "linear"]),
]
SWEPT = [
    *("LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM", "Qwen2ForCausalLM", "Qwen2MoeForCausalLM"),
    *("Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM"),
    *("PhiForCausalLM", "Phi3ForCausalLM", "GPT2LMHeadModel", "BloomForCausalLM"),
    *("OPTForCausalLM", "FalconForCausalLM", "MptForCausalLM", "RobertaForMaskedLM", "XLMRobertaForMaskedLM"),
    *("DebertaForMaskedLM", "DebertaV2ForMaskedLM", "DistilBertForMaskedLM", "ElectraForMaskedLM"),
    *("AlbertForMaskedLM", "T5ForConditionalGeneration", "MT5ForConditionalGeneration"),
]
OTHERS = [
    ("BERT", bert, token_ids, "all-linear"),
    ("ViT", vit, images, "all-linear"),
    ("Whisper", whisper, speech, ["q_proj", "fc1", "out_proj"]),
    ("LLaVA", llava, image_and_text, r".*(language_model|vision_tower).*(q_proj|fc1|up_proj)"),
]


def _text_for(name: str) -> Callable[[], Inputs]:
    return translation if "T5" in name else token_ids


FAMILIES = [
    *(pytest.param(*family[1:], id=family[0]) for family in NAMED_NOWHERE_ELSE),
    *(pytest.param(*family[1:], id=family[0], marks=pytest.mark.nightly) for family in OTHERS),
    *(
        pytest.param(partial(of_class, name), _text_for(name), "all-linear", id=name, marks=pytest.mark.nightly)
        for name in SWEPT
    ),
]


@pytest.mark.parametrize(("model", "inputs", "targets"), FAMILIES)
def test_a_family_computes_after_merging_what_peft_0_21_2_trained_it_to(
    model: Callable[[], nn.Module], inputs: Callable[[], Inputs], targets: Any, tmp_path: Path
) -> None:
    config = LoraConfig(r=2, lora_alpha=5, target_modules=targets)
    trained = train(model(), config, tmp_path, inputs=inputs())
    factors = load_file(trained.adapter / "adapter_model.safetensors")
    assert any(t.abs().max() > 0.05 for name, t in factors.items() if "lora_B" in name), "nothing was learned"
    assert_merges_as_trained(trained, inputs(), tmp_path / "out")
    assert set(tensors_of(tmp_path / "out")) >= set(tensors_of(trained.base))


def test_siglips_pooling_attention_merges_to_what_peft_0_21_2_merges(tmp_path: Path) -> None:
    """Not trained before: PEFT adds and takes away its update at each forward pass, and the base drifts in float32."""
    config = LoraConfig(r=2, lora_alpha=5, target_modules=r"vision_model\.head\.attention")
    trained = train(siglip(), config, tmp_path)
    assert_merges_as_trained(trained, text_and_images(), tmp_path / "out")


@dataclass(frozen=True)
class Older:
    """A vision-language model's adapter by the names of another release."""

    model: Callable[[], nn.Module]
    targets: str
    renames: list[tuple[str, str]]
    """From the names of transformers 5.23."""


BOTH_TOWERS = r".*(language_model|text_model|vision_tower|vision_model|visual).*(q_proj|down_proj|fc1|qkv)"
OLDER = {
    "Qwen2-VL of 4.51": Older(
        qwen2_vl, BOTH_TOWERS, [(r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual.")]
    ),
    "Qwen2.5-VL of 4.51": Older(
        qwen2_5_vl, BOTH_TOWERS, [(r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual.")]
    ),
    "Gemma 3 of 4.51": Older(
        gemma3,
        BOTH_TOWERS,
        [
            (r"^model\.language_model\.", "language_model.model."),
            (r"^model\.vision_tower\.", "vision_tower.vision_model."),
        ],
    ),
    "PaliGemma of 4.51": Older(
        paligemma,
        BOTH_TOWERS,
        [
            (r"^model\.language_model\.", "language_model.model."),
            (r"^model\.vision_tower\.", "vision_tower.vision_model."),
        ],
    ),
    "Gemma 3 of 4.52": Older(gemma3, BOTH_TOWERS, [(r"^model\.vision_tower\.", "model.vision_tower.vision_model.")]),
}


def _rename(adapter: Path, renames: list[tuple[str, str]]) -> int:
    """Give the saved adapter other names; say how many have changed."""
    root, path = "base_model.model.", adapter / "adapter_model.safetensors"
    tensors, n_changed = {}, 0
    for key, tensor in load_file(path).items():
        name = key.removeprefix(root)
        for pattern, new in renames:
            name = re.sub(pattern, new, name)
        tensors[root + name] = tensor
        n_changed += root + name != key
    save_file(tensors, path)
    return n_changed


@pytest.mark.parametrize("older", OLDER.values(), ids=OLDER)
@pytest.mark.parametrize("is_as_released", [True, False], ids=["base as released", "base by the names in memory"])
def test_an_adapter_of_an_older_release_merges_to_what_peft_0_21_2_merges_whatever_the_bases_names(
    older: Older, is_as_released: bool, tmp_path: Path
) -> None:
    model = older.model()
    base = tmp_path / "base"
    model.save_pretrained(base, save_original_format=is_as_released)
    trained = train(model, LoraConfig(r=2, lora_alpha=5, target_modules=older.targets), tmp_path, base=base)
    assert _rename(trained.adapter, older.renames) >= 2
    merge(trained.adapter, base, tmp_path / "out")
    assert set(tensors_of(tmp_path / "out")) == set(tensors_of(base))
    found = {name: t.float() for name, t in reload(trained.bare, tmp_path / "out").state_dict().items()}
    assert_rounded_once(found, trained.merged())


def test_a_name_of_one_tower_never_fits_the_other(tmp_path: Path) -> None:
    """Both towers of CLIP have a layer of this name and shape; without the tower's name it means neither."""
    trained = train(clip(), LoraConfig(r=2, target_modules=r".*text_model.*q_proj"), tmp_path)
    assert _rename(trained.adapter, [(r"^text_model\.", "")]) == 4
    with pytest.raises(IncompatibleAdapterError):
        merge(trained.adapter, trained.base, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert torch.is_tensor(trained.output(text_and_images()))
