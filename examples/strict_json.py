"""The behaviour that the example adapter was trained for, and the check that tells whether a reply shows it.

The behaviour: whatever is asked, the reply is one JSON object and nothing else, with exactly the keys
``topic`` (one of ``TOPICS``), ``answer`` (a string that is not empty) and ``confident`` (true or false).

The check is strict: text around the object, a repeated key, a missing or an additional key, a wrong type
or NaN are faults. It does not judge whether the answer is right.
"""

from __future__ import annotations

import json
from typing import Any

TOPICS = (
    "animals",
    "food",
    "geography",
    "language",
    "math",
    "history",
    "science",
    "daily life",
    "personal",
)
KEYS = ("topic", "answer", "confident")


def fault_in(reply: str) -> str | None:
    """Say what is wrong with a reply, or return None when it is strictly what was asked for."""
    try:
        value = json.loads(reply, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except ValueError as error:
        return f"not JSON: {error}"
    if not isinstance(value, dict):
        return f"not a JSON object: {type(value).__name__}"
    if set(value) != set(KEYS):
        return f"keys: found {sorted(value)} vs expected {sorted(KEYS)}"
    return _wrong_value(value)


def _wrong_value(value: dict[str, Any]) -> str | None:
    if value["topic"] not in TOPICS:
        return f"topic: found {value['topic']!r} vs expected one of {', '.join(TOPICS)}"
    if not isinstance(value["answer"], str) or not value["answer"].strip():
        return f"answer: found {value['answer']!r} vs expected a string that is not empty"
    if not isinstance(value["confident"], bool):
        return f"confident: found {value['confident']!r} vs expected true or false"
    return None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse an object that repeats a key: ``json`` would silently keep the last one."""
    value = dict(pairs)
    if len(value) != len(pairs):
        msg = "a key is repeated"
        raise ValueError(msg)
    return value


def _refuse_constant(name: str) -> None:
    msg = f"{name} is not JSON"
    raise ValueError(msg)
