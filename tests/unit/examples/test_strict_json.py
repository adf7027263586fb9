"""The check that decides whether the example adapter works is strict."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[3] / "examples"
GOOD = {"topic": "food", "answer": "Tea.", "confident": True}


@pytest.fixture
def strict_json(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("strict_json")


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (EXAMPLES / name).read_text(encoding="utf-8").splitlines()]


def test_the_wanted_reply_has_no_fault_in_any_key_order_or_spacing(strict_json: ModuleType) -> None:
    assert strict_json.fault_in(json.dumps(GOOD)) is None
    assert strict_json.fault_in(json.dumps(dict(reversed(GOOD.items())), indent=2) + "\n") is None


@pytest.mark.parametrize(
    ("reply", "fault"),
    [
        ("", "not JSON"),
        ("Tea.", "not JSON"),
        ("Sure! " + json.dumps(GOOD), "not JSON"),
        (json.dumps(GOOD) + " I hope this helps.", "not JSON"),
        ("```json\n" + json.dumps(GOOD) + "\n```", "not JSON"),
        (json.dumps(GOOD)[:-1], "not JSON"),
        (json.dumps(GOOD)[:-1] + ', "topic": "math"}', "a key is repeated"),
        ('{"topic": "food", "answer": NaN, "confident": true}', "NaN is not JSON"),
        (json.dumps([GOOD]), "not a JSON object: list"),
        (json.dumps({**GOOD, "more": 1}), "keys: found"),
        (json.dumps({"topic": "food", "answer": "Tea."}), "keys: found"),
        (json.dumps({**GOOD, "topic": "music"}), "topic: found 'music'"),
        (json.dumps({**GOOD, "topic": ["food"]}), "topic: found"),
        (json.dumps({**GOOD, "answer": " "}), "answer: found"),
        (json.dumps({**GOOD, "answer": 4}), "answer: found 4"),
        (json.dumps({**GOOD, "confident": 1}), "confident: found 1"),
        (json.dumps({**GOOD, "confident": "true"}), "confident: found 'true'"),
    ],
)
def test_every_departure_is_named(reply: str, fault: str, strict_json: ModuleType) -> None:
    assert fault in strict_json.fault_in(reply)


def test_every_reply_of_the_training_set_is_strict(strict_json: ModuleType) -> None:
    training = rows("instructions.jsonl")
    assert len(training) >= 200
    assert [row for row in training if strict_json.fault_in(json.dumps(row["reply"])) is not None] == []


def test_no_held_back_prompt_was_trained_on(strict_json: ModuleType) -> None:
    trained_on = {row["prompt"].casefold() for row in rows("instructions.jsonl")}
    held_back = [row["prompt"].casefold() for row in rows("held_back.jsonl")]
    assert len(held_back) == len(set(held_back)) >= 40
    assert trained_on.isdisjoint(held_back)
    assert {row["topic"] for row in rows("held_back.jsonl")} == {*strict_json.TOPICS, None}
