"""PEFT's configuration: types, unknown keys, what cannot be merged."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from lora_deploy.adapters.peft.config import PeftConfig, parse_config, refuse_unmergeable
from lora_deploy.errors import MalformedAdapterError, UnmergeableAdapterError

FILE = Path("adapter_config.json")


def test_every_field_of_peft_0_21_is_known() -> None:
    fields = {found.name for found in dataclasses.fields(LoraConfig) if not found.name.startswith("_")}
    assert fields <= set(PeftConfig.model_fields)


def test_the_defaults_are_those_of_peft_0_21() -> None:
    ours, theirs = PeftConfig(), LoraConfig()
    for name in ("r", "lora_alpha", "use_rslora", "use_dora", "bias", "lora_bias", "init_lora_weights", "rank_pattern"):
        assert getattr(ours, name) == getattr(theirs, name), name


def test_what_peft_saves_is_accepted(tmp_path: Path) -> None:
    LoraConfig(r=4, lora_alpha=7, target_modules=["q"], rank_pattern={"a.*b": 2}).save_pretrained(str(tmp_path))
    import json

    config = parse_config(json.loads((tmp_path / "adapter_config.json").read_text()), FILE)
    assert (config.r, config.lora_alpha, config.rank_pattern) == (4, 7, {"a.*b": 2})
    assert config.version is not None
    assert not config.is_newer_than_known


@pytest.mark.parametrize("value", [1, "on", [0], {"scale": 2}, True, 0.5])
def test_an_unknown_key_that_is_switched_on_is_refused_by_its_name(value: Any) -> None:
    with pytest.raises(UnmergeableAdapterError, match=r"found use_new_variant=.*it may name a variant"):
        parse_config({"peft_type": "LORA", "use_new_variant": value}, FILE)


@pytest.mark.parametrize("value", [None, False, 0, "", [], {}])
def test_an_unknown_key_that_is_switched_off_is_accepted(value: Any) -> None:
    assert parse_config({"peft_type": "LORA", "use_new_variant": value}, FILE).r == 8


def test_keys_that_other_trainers_add_for_training_are_accepted() -> None:
    assert parse_config({"peft_type": "LORA", "lora_plus_lr_ratio": 16, "merge_weights": False}, FILE).r == 8


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"r": 0}, "r: input should be greater than 0"),
        ({"r": "eight"}, "r: input should be a valid integer"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"bias": "some"}, "bias: input should be 'none', 'all' or 'lora_only'"),
        ({"rank_pattern": {"(": 4}}, "is not a regular expression"),
        ({"use_bdlora": {"nblocks": 2, "surprise": 1}}, "use_bdlora.surprise"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_field_of_the_wrong_type_is_named(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(MalformedAdapterError, match=problem):
        parse_config({"peft_type": "LORA", **fields}, FILE)


def test_a_configuration_of_something_else_is_refused() -> None:
    with pytest.raises(MalformedAdapterError, match="neither peft_type nor lora_alpha"):
        parse_config({"base_model": "x", "rank": 4}, FILE)


@pytest.mark.parametrize(
    ("text", "version"),
    [("0.18.0", (0, 18, 0)), ("0.18.2.dev0@UNKNOWN", (0, 18, 2)), ("1.0", (1, 0, 0)), (None, None), ("dev", None)],
)
def test_the_version_is_read_as_a_tuple(text: str | None, version: tuple[int, ...] | None) -> None:
    assert PeftConfig(peft_version=text).version == version


@pytest.mark.parametrize(("text", "newer"), [("0.21.2", False), ("0.21.3", True), ("0.22.0", True), (None, False)])
def test_a_newer_release_than_was_checked_is_seen(text: str | None, newer: bool) -> None:
    assert PeftConfig(peft_version=text).is_newer_than_known is newer


# --------------------------------------------------------------------------------------------------------- unmergeable


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"use_qalora": True}, "QALoRA acts on a pooled input"),
        ({"arrow_config": {"top_k": 2}}, "Arrow routes"),
        ({"alora_invocation_tokens": [5, 7]}, "aLoRA is active only after"),
    ],
    ids=["QALoRA", "Arrow", "aLoRA"],
)
@pytest.mark.parametrize("base_is_residual", [False, True])
def test_what_no_weights_can_express_is_refused(fields: dict[str, Any], reason: str, base_is_residual: bool) -> None:
    config = parse_config({"peft_type": "LORA", **fields}, FILE)
    with pytest.raises(UnmergeableAdapterError, match=reason):
        refuse_unmergeable(config, FILE, base_is_residual=base_is_residual)


@pytest.mark.parametrize(
    ("init", "reason"),
    [
        ("pissa_niter_16", "randomised SVD"),
        ("corda", "training data"),
        ("lora_ga", "training gradients"),
        ("loftq", "quantised residual base"),
    ],
)
def test_what_needs_the_base_that_training_wrote_is_refused_without_it(init: str, reason: str) -> None:
    config = PeftConfig(init_lora_weights=init)
    with pytest.raises(UnmergeableAdapterError, match=reason) as caught:
        refuse_unmergeable(config, FILE, base_is_residual=False)
    assert "--base-is-residual" in str(caught.value.hint)
    refuse_unmergeable(config, FILE, base_is_residual=True)


@pytest.mark.parametrize(
    "init", [True, False, None, "gaussian", "orthogonal", "mica", "eva", "pissa", "olora", "OLoRA"]
)
def test_what_the_original_base_completes_is_not_refused(init: bool | str | None) -> None:
    refuse_unmergeable(PeftConfig(init_lora_weights=init), FILE, base_is_residual=False)


def test_an_initialisation_that_peft_does_not_have_is_refused() -> None:
    with pytest.raises(MalformedAdapterError, match="'magic' is none of peft"):
        refuse_unmergeable(PeftConfig(init_lora_weights="magic"), FILE, base_is_residual=True)


@pytest.mark.parametrize(
    ("targets", "module", "names"),
    [
        (["experts.up", "experts.down"], "model.h.0.experts", ("up", "down")),
        (["model.h.0.experts.up"], "model.h.1.experts", ()),
        (["up"], "anything", ("up",)),
        (["perts.up"], "model.experts", ()),
        (None, "model.experts", ()),
    ],
)
def test_target_parameters_name_parameters_of_modules_by_whole_components(
    targets: list[str] | None, module: str, names: tuple[str, ...]
) -> None:
    config = parse_config({"peft_type": "LORA", "target_parameters": targets}, FILE)
    assert config.adapts_parameters_of(module) == names
