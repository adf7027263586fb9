"""The key grammar: wrappers, adapter names, slots, whole tensors."""

from pathlib import Path

import pytest

from lora_deploy.adapters.keys import unwrapped
from lora_deploy.adapters.peft.key_table import sort_keys
from lora_deploy.errors import (
    AmbiguousAdapterFormatError,
    MalformedAdapterError,
    RecipeError,
    UnmergeableAdapterError,
)

FILE = Path("a.safetensors")


# ------------------------------------------------------------------------------------------------------------ wrappers


@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.h.0.q.lora_A.weight",
        "h.0.q.lora_A.weight",
        "module.base_model.model.h.0.q.lora_A.weight",
        "_orig_mod.base_model.model.h.0.q.lora_A.weight",
        "base_model.model._orig_mod.h.0.q.lora_A.weight",
        "_fsdp_wrapped_module.base_model.model.h.0._fsdp_wrapped_module.q.lora_A.weight",
        "_forward_module.base_model.model.h.0._checkpoint_wrapped_module.q.lora_A.weight",
        "model.base_model.model.h.0.q.lora_A.weight",
    ],
)
def test_what_training_wraps_around_modules_is_removed(key: str) -> None:
    assert unwrapped(FILE, [key]) == {key: "h.0.q.lora_A.weight"}


def test_a_module_that_is_called_module_keeps_its_name_when_others_have_no_such_prefix() -> None:
    assert (
        unwrapped(FILE, ["module.q.lora_A.weight", "head.weight"])["module.q.lora_A.weight"] == "module.q.lora_A.weight"
    )


def test_two_keys_that_mean_the_same_are_an_error() -> None:
    with pytest.raises(MalformedAdapterError, match=r"both mean q\.lora_A\.weight"):
        unwrapped(FILE, ["q.lora_A.weight", "q._orig_mod.lora_A.weight"])


# --------------------------------------------------------------------------------------------------------------- slots


@pytest.mark.parametrize(
    ("suffix", "slot"),
    [
        ("lora_A.weight", "lora_A"),
        ("lora_A.default.weight", "lora_A"),
        ("lora_B.bias", "lora_B.bias"),
        ("lora_B.default.bias", "lora_B.bias"),
        ("lora_embedding_A", "lora_embedding_A"),
        ("lora_embedding_B.default", "lora_embedding_B"),
        ("lora_magnitude_vector", "lora_magnitude_vector"),
        ("lora_magnitude_vector.weight", "lora_magnitude_vector"),
        ("lora_magnitude_vector.default", "lora_magnitude_vector"),
        ("lora_magnitude_vector.default.weight", "lora_magnitude_vector"),
        ("lora_diag", "lora_diag"),
        ("lora_diag.default", "lora_diag"),
    ],
)
def test_every_form_of_a_slot_is_read(suffix: str, slot: str) -> None:
    key = f"base_model.model.h.0.q.{suffix}"
    assert sort_keys(FILE, [key], None).modules == {"h.0.q": {slot: key}}


def test_a_module_at_the_root_has_an_empty_path() -> None:
    assert sort_keys(FILE, ["base_model.model.lora_A.weight"], None).modules == {
        "": {"lora_A": "base_model.model.lora_A.weight"}
    }


def test_two_forms_of_one_slot_are_an_error() -> None:
    with pytest.raises(MalformedAdapterError, match="both give lora_A"):
        sort_keys(FILE, ["q.lora_A.weight", "q.lora_A.default.weight"], None)


@pytest.mark.parametrize("key", ["q.lora_A", "q.lora_C.weight", "q.lora_A.default.extra.weight", "base_model.vera_A"])
def test_a_tensor_that_peft_does_not_write_is_an_error(key: str) -> None:
    with pytest.raises(MalformedAdapterError, match=r"no tensor that peft <= 0\.21\.2 writes"):
        sort_keys(FILE, ["base_model.model.k.lora_A.weight", key], None)


@pytest.mark.parametrize("key", ["prompt_embeddings", "base_model.model.h.0.self_attn.adaption_prompt"])
def test_virtual_tokens_are_refused(key: str) -> None:
    with pytest.raises(UnmergeableAdapterError, match="virtual tokens"):
        sort_keys(FILE, [key], None)


# ------------------------------------------------------------------------------------------------------ adapter names

TWO_ADAPTERS = [
    "h.0.q.lora_A.vision.weight",
    "h.0.q.lora_B.vision.weight",
    "h.0.q.lora_A.speech.weight",
    "h.0.head.modules_to_save.speech.weight",
    "h.0.head.original_module.weight",
]


def test_several_adapters_in_one_file_need_a_choice() -> None:
    with pytest.raises(AmbiguousAdapterFormatError, match="holds 2 adapters: speech, vision") as caught:
        sort_keys(FILE, TWO_ADAPTERS, None)
    assert caught.value.hint == "choose one with --adapter-name"
    with pytest.raises(RecipeError, match="no adapter 'text' in the file, it holds speech, vision"):
        sort_keys(FILE, TWO_ADAPTERS, "text")


def test_the_chosen_adapter_is_read_and_the_others_are_put_aside() -> None:
    vision = sort_keys(FILE, TWO_ADAPTERS, "vision")
    assert vision.modules == {"h.0.q": {"lora_A": TWO_ADAPTERS[0], "lora_B": TWO_ADAPTERS[1]}}
    assert vision.tensors == {}
    assert vision.ignored == {
        "of another adapter than 'vision'": TWO_ADAPTERS[2:4],
        "the original of a module that training replaced": TWO_ADAPTERS[4:],
    }
    speech = sort_keys(FILE, TWO_ADAPTERS, "speech")
    assert speech.tensors == {"h.0.head.weight": TWO_ADAPTERS[3]}


# ------------------------------------------------------------------------------------------------------ whole tensors


def test_whole_tensors_replace_unless_they_are_copies_below_a_change() -> None:
    keys = {
        "score.weight": "base_model.model.score.weight",
        "h.0.q.bias": "base_model.model.h.0.q.base_layer.bias",
        "h.0.norm.bias": "base_model.model.h.0.norm.bias",
    }
    changed = ["base_model.model.h.0.q.lora_A.weight", "base_model.model.emb.lora_embedding_A"]
    copies = {
        "h.0.q.weight": "base_model.model.h.0.q.base_layer.weight",
        "emb.weight": "base_model.model.emb.base_layer.weight",
        "tok.weight": "base_model.model.tok.token_adapter.base_layer.weight",
    }
    tokens = {"tok": "base_model.model.tok.token_adapter.trainable_tokens_delta"}
    table = sort_keys(FILE, [*keys.values(), *changed, *copies.values(), *tokens.values()], None)
    assert table.tensors == keys
    assert table.copies == copies
    assert table.tokens == tokens


def test_an_embedding_that_is_saved_with_a_change_of_another_module_replaces() -> None:
    table = sort_keys(FILE, ["q.lora_A.weight", "lm_head.weight"], None)
    assert table.tensors == {"lm_head.weight": "lm_head.weight"}


def test_what_only_training_used_is_put_aside() -> None:
    keys = [
        "q.lora_velora_embed.default",
        "q.lora_velora_embed",
        "q.lora_monteclora_sampler.std_prior",
        "q.lora_monteclora_sampler.default.std_prior",
        "tok.token_adapter.trainable_tokens_original.default",
        "rotary_emb.inv_freq",
    ]
    table = sort_keys(FILE, keys, None)
    assert [table.modules, table.tensors, table.tokens, table.copies] == [{}, {}, {}, {}]
    assert sorted(key for group in table.ignored.values() for key in group) == sorted(keys)


def test_a_resized_and_saved_embedding_is_read_once_though_peft_saves_it_twice() -> None:
    keys = ["tok.weight", "tok.modules_to_save.weight", "tok.original_module.weight", "head.modules_to_save.weight"]
    table = sort_keys(FILE, keys, None)
    assert table.tensors == {"tok.weight": keys[0], "head.weight": keys[3]}
    assert table.ignored == {
        "saved a second time, under its own name too": [keys[1]],
        "the original of a module that training replaced": [keys[2]],
    }


def test_lora_inside_a_module_that_is_saved_whole_is_an_error() -> None:
    with pytest.raises(MalformedAdapterError, match="LoRA inside a module that is saved whole"):
        sort_keys(FILE, ["head.modules_to_save.default.q.lora_X.weight"], None)
