"""The model card says what the records say, and its command is one that the command line takes."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any

import click
import pytest
import yaml

from lora_deploy.cli import main
from lora_deploy.merge.record import RecordedOrigin
from lora_deploy.release import card
from lora_deploy.release.reproduction import commands
from tests.unit.release.records import card_facts, export_record, merge_record


def front_matter(facts: card.CardFacts) -> dict[str, Any]:
    text = card._front_matter(facts)
    assert text.startswith("---\n")
    found: dict[str, Any] = yaml.safe_load(text.strip("-\n"))
    return found


def test_one_adapter_makes_a_fine_tune_of_its_base() -> None:
    said = front_matter(card_facts(merge_record()))
    assert said["base_model"] == "owner/base"
    assert said["base_model_relation"] == "finetune"
    assert (said["license"], said["datasets"], said["language"]) == ("mit", ["some/data"], "de")
    assert said["tags"] == ["lora-deploy", "merged"]


def test_several_adapters_of_one_parent_are_a_fine_tune_and_of_two_a_merge() -> None:
    assert front_matter(card_facts(merge_record("owner/base", "owner/base")))["base_model_relation"] == "finetune"
    assert front_matter(card_facts(merge_record("owner/base", "owner/other")))["base_model_relation"] == "merge"


def test_a_quantised_export_makes_it_quantised() -> None:
    plain = card_facts(merge_record(), onnx=export_record())
    quantised = card_facts(merge_record(), onnx=export_record(quantisation={"method": "int4", "block_size": 32}))
    assert front_matter(plain)["base_model_relation"] == "finetune"
    assert front_matter(quantised)["base_model_relation"] == "quantized"
    assert "onnx" in front_matter(quantised)["tags"]


def parsed(command: str) -> dict[str, Any]:
    """Let the command line itself read a command."""
    program, name, *words = shlex.split(command)
    assert program == "lora-deploy"
    with main.commands[name].make_context(name, words, **main.context_settings) as context:
        assert isinstance(context, click.Context)
        return context.params


def test_the_commands_say_every_choice_that_decides_a_byte() -> None:
    record = merge_record(
        "owner/base",
        options={
            "read": {"alpha": 16.0, "adapter_name": "de fr", "enable_lora": [True, False], "base_is_residual": True},
            "bind": {
                "weights": [0.1],
                "include": ["*.q_proj.*", "*.v_proj.*"],
                "exclude": ["lm_head*"],
                "tokenizer": "base",
                "components": ["unet"],
                "variant": "fp16",
                "into_language_model": True,
            },
            "merge": {"dtype": "bfloat16", "max_shard_bytes": 1000},
        },
    )
    (adapter,) = record.adapters
    record = record.model_copy(update={"adapters": (adapter.model_copy(update={"weight": 0.1}),)})
    found = parsed(commands(record, {}, "owner/base")[0])
    assert found["adapters"] == ("adapter0",)
    assert found["base"] == "owner/base@abc"
    expected = {
        "weights": (0.1,),
        "alpha": 16.0,
        "adapter_name": "de fr",
        "enable_lora": (True, False),
        "base_is_residual": True,
        "include": ("*.q_proj.*", "*.v_proj.*"),
        "exclude": ("lm_head*",),
        "tokenizer": "base",
        "components": ("unet",),
        "variant": "fp16",
        "into_language_model": True,
        "dequantize": False,
        "dtype": "bfloat16",
        "max_shard_bytes": 1000,
    }
    assert {name: found[name] for name in expected} == expected


def test_the_command_unpacks_a_base_that_was_unpacked() -> None:
    finding = {"code": "dequantised-base", "severity": "note", "target": "owner/base", "message": "was packed"}
    assert parsed(commands(merge_record(findings=[finding]), {}, "owner/base")[0])["dequantize"] is True


def test_tags_of_the_adapters_card_are_kept_but_those_of_an_adapter() -> None:
    card_of_adapter = {"tags": ["poetry", "PEFT", "lora", "base_model:adapter:owner/base", 7]}
    facts = dataclasses.replace(card_facts(merge_record()), adapter_card=card_of_adapter)
    assert front_matter(facts)["tags"] == ["lora-deploy", "merged", "poetry"]
    for odd in ({"tags": "poetry"}, {"tags": None}, {}):
        assert front_matter(dataclasses.replace(facts, adapter_card=odd))["tags"] == ["lora-deploy", "merged"]


def test_the_bases_time_is_claimed_only_where_it_was_proven() -> None:
    facts = card_facts(merge_record())
    assert "base's time" not in card.card_text(facts)
    assert "base's time" in card.card_text(dataclasses.replace(facts, verdicts={"latency": "pass"}))


def test_graphs_that_were_merged_into_have_the_name_of_their_folder() -> None:
    base = merge_record().base.model_copy(update={"name": "/home/somebody/whisper/model.onnx"})
    assert card.public_name(merge_record("x").model_copy(update={"base": base})) == "whisper"


def test_latency_is_said_in_times_and_not_in_digests() -> None:
    found = {"ratio": 1.01, "low": 0.98, "high": 1.04}
    report = {"proof": {"is_equal": True, "reason": "digest"}, "ratios": {"merged": {"cpu": {"prefill": found}}}}
    said = "the graphs are the base's, node for node; prefill 1.010 of the base's time [0.980, 1.040]"
    assert card.figures("latency", {"latency": report}) == said
    assert card.figures("latency", {"latency": {"proof": {"is_equal": False, "reason": "a node"}}}) == "a node"


def test_an_export_straight_from_base_and_adapters_is_made_by_one_command() -> None:
    record = merge_record("owner/base", "owner/base")
    origin = RecordedOrigin(
        versions={}, base=record.base, adapters=record.adapters, options={**record.options, "merge": {"dtype": "base"}}
    )
    first, *rest = commands(origin, {".": export_record()}, "owner/base")
    found = parsed(first)
    assert (found["adapters"], found["base"]) == (("adapter0", "adapter1"), "owner/base@abc")
    assert rest == ["lora-deploy verify exported", "lora-deploy release exported"]


def test_defaults_are_left_out() -> None:
    merge, *_ = commands(merge_record(), {}, "owner/base")
    assert merge == "lora-deploy merge adapter0 --base owner/base@abc --dtype float16 -o merged"


@pytest.mark.parametrize(
    ("quantisation", "expected"),
    [
        (None, {"quantize": None}),
        ({"method": "int8", "block_size": None, "is_symmetric": None}, {"quantize": "int8", "block_size": None}),
        (
            {"method": "int4", "block_size": 64, "is_symmetric": False},
            {"quantize": "int4", "block_size": 64, "is_symmetric": False},
        ),
    ],
)
def test_an_exports_command_says_how_it_was_quantised(quantisation: Any, expected: dict[str, Any]) -> None:
    options = {"quantisation": quantisation} if quantisation else {}
    found = parsed(commands(merge_record(), {"onnx": export_record(storage="shared", **options)}, "b")[1])
    assert found["storage"] == "shared"
    assert {name: found[name] for name in expected} == expected
