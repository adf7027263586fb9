"""The JSON Schema of recipes, which editors complete from, and the keys that it knows at a place."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from lora_deploy.recipe.model import Recipe


@cache
def schema() -> Mapping[str, Any]:
    """Give the schema of what a recipe file may say."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema(by_alias=True)}


def schema_text() -> str:
    """Write the schema, ending in a newline."""
    return json.dumps(schema(), indent=2) + "\n"


def keys_at(where: tuple[str | int, ...]) -> list[str]:
    """List the keys that a mapping at this place may have, in their order."""
    found = list(_shapes(schema()))
    for part in where:
        inner = [
            shape
            for parent in found
            for shape in ([parent.get("items")] if isinstance(part, int) else [parent.get("properties", {}).get(part)])
            if shape
        ]
        found = [shape for one in inner for shape in _shapes(one)]
    return list(dict.fromkeys(name for shape in found for name in shape.get("properties", {})))


def _shapes(node: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """List the shapes that a value may have, references resolved."""
    if "$ref" in node:
        yield from _shapes(schema()["$defs"][node["$ref"].rpartition("/")[2]])
        return
    choices = [*node.get("anyOf", []), *node.get("oneOf", [])]
    for choice in choices:
        yield from _shapes(choice)
    if not choices:
        yield node
