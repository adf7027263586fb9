"""YAML to ``Recipe``: every fault at once, each with file, line and the nearest valid key.

Overrides come on top of the file: environment variables ``LORA_DEPLOY__MERGE__MEMORY=4GB``, then ``--set
merge.memory=4GB``; both are read as YAML.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from lora_deploy.errors import RecipeError
from lora_deploy.recipe.model import Recipe
from lora_deploy.recipe.schema import keys_at

_PREFIX = "LORA_DEPLOY__"
_SECRETS = {"token", "hf_token", "password", "secret"}
Where = tuple[str | int, ...]


def read_recipe(path: Path, overrides: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> Recipe:
    """Read a recipe file; ``overrides`` are ``a.b=value``.

    Raises:
        RecipeError: It cannot be read, or it says what no recipe can say; every fault is named.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return parse_recipe(text, str(path), overrides, os.environ if environment is None else environment)


def parse_recipe(
    text: str, source: str, overrides: Sequence[str] = (), environment: Mapping[str, str] | None = None
) -> Recipe:
    """Read the text of a recipe; ``source`` names it in messages.

    Raises:
        RecipeError: As ``read_recipe``.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        document = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise RecipeError(f"{source}: is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict):
        found = "nothing" if document is None else type(document).__name__
        raise RecipeError(f"{source}: found {found}, expected keys such as adapters and base")
    places: dict[Where, str] = {}
    _note_lines(node, (), source, places)
    for name, value in (environment or {}).items():
        if name.startswith(_PREFIX):
            where = tuple(_index(part) for part in name.removeprefix(_PREFIX).lower().split("__"))
            _set(document, where, value, f"${name}", places)
    for override in overrides:
        dotted, equals, value = override.partition("=")
        if not equals or not dotted:
            raise RecipeError(f"--set {override}: expected key.key=value")
        _set(document, tuple(_index(part) for part in dotted.split(".")), value, f"--set {dotted}", places)
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        raise _refused(source, error.errors(), places) from error


def _note_lines(node: yaml.Node | None, where: Where, source: str, places: dict[Where, str]) -> None:
    """Note where every key and item stands.

    Raises:
        RecipeError: One key twice in one mapping, which YAML itself would let pass.
    """
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            name = str(key.value)
            if name in seen and name != "<<":
                raise RecipeError(f"{source}:{line}: {_dotted((*where, name))}: was said in line {seen[name]} already")
            seen[name] = line
            places[*where, name] = f"{source}:{line}"
            _note_lines(value, (*where, name), source, places)
    elif isinstance(node, yaml.SequenceNode):
        for k, item in enumerate(node.value):
            places[*where, k] = f"{source}:{item.start_mark.line + 1}"
            _note_lines(item, (*where, k), source, places)


def _index(part: str) -> str | int:
    return int(part) if part.isdigit() else part


def _set(document: Any, where: Where, text: str, origin: str, places: dict[Where, str]) -> None:  # noqa: ANN401
    """Put a value into the document, making mappings on the way."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{origin}: {text!r} is not YAML: {' '.join(str(error).split())}") from error
    *way, last = where
    for k, part in enumerate(way):
        inner = _inner(document, part)
        if not isinstance(inner, dict | list):
            inner = _opened(inner, tuple(way[: k + 1]))
            _put(document, part, inner, origin)
        document = inner
    _put(document, last, value, origin)
    places[where] = origin


def _opened(value: Any, where: Where) -> Any:  # noqa: ANN401 - YAML
    """Write out a short form, so that a key can be set in it: a base or an adapter that is only a path."""
    is_path = where == ("base",) or (len(where) == 2 and where[0] == "adapters")
    return {"path": value} if is_path and isinstance(value, str) else {}


def _inner(document: Any, part: str | int) -> Any:  # noqa: ANN401 - YAML
    if isinstance(document, list):
        return document[part] if isinstance(part, int) and part < len(document) else None
    return document.get(part)


def _put(document: Any, part: str | int, value: Any, origin: str) -> None:  # noqa: ANN401 - YAML
    if isinstance(document, list):
        if not isinstance(part, int) or part > len(document):
            raise RecipeError(f"{origin}: found {part!r}, expected a number up to {len(document)}")
        document[part : part + 1] = [value]
    else:
        document[part] = value


def _refused(source: str, errors: Sequence[ErrorDetails], places: Mapping[Where, str]) -> RecipeError:
    lines, hints = [], []
    for error in errors:
        where = _plain(error["loc"], places)
        line, hint = _said(where, error)
        lines.append(f"{_place(where, places) or source}: {line}")
        if hint:
            hints.append(hint)
    first, *rest = dict.fromkeys(lines)
    return RecipeError("\n  ".join([first, *rest]), hint="; ".join(dict.fromkeys(hints)) or None)


def _plain(location: tuple[str | int, ...], places: Mapping[Where, str]) -> Where:
    """Leave out of pydantic's location what is no key of the document: validators, the 0 of one that stands alone."""
    where: Where = ()
    for part in location:
        is_validator = isinstance(part, str) and not part.isidentifier()
        stands_for_several = part == 0 and (*where, part) not in places
        if not (is_validator or stands_for_several):
            where = (*where, part)
    return where


def _place(where: Where, places: Mapping[Where, str]) -> str | None:
    """Find where a key stands, or what it should be in, or else what made that."""
    for n in range(len(where), 0, -1):
        inside = (place for known, place in places.items() if known[:n] == where[:n])
        place = places.get(where[:n]) or next(inside, None)
        if place:
            return place
    return None


def _said(where: Where, error: ErrorDetails) -> tuple[str, str | None]:
    """Say what is wrong with a value, and what to do about it."""
    name = str(where[-1]) if where else ""
    if error["type"] == "extra_forbidden":
        if name.lower() in _SECRETS:
            return f"{_dotted(where)}: a secret has no place in a recipe", "set HF_TOKEN in the environment"
        known = keys_at(where[:-1])
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        meant = f"; nearest: {nearest[0]}" if nearest else f"; known are {', '.join(known)}"
        return f"{_dotted(where)}: unknown key{meant}", None
    if error["type"] == "missing":
        return f"{_dotted(where)}: is missing", None
    message = error["msg"].removeprefix("Value error, ")
    value = error["input"]
    found = (
        f", found {value!r}" if isinstance(value, str | int | float | bool) and error["type"] != "value_error" else ""
    )
    return f"{_dotted(where)}: {message[0].lower()}{message[1:]}{found}" if where else message, None


def _dotted(where: Where) -> str:
    return ".".join(map(str, where))


def write_new(path: Path, text: str) -> None:
    """Write a recipe to a file that does not exist.

    Raises:
        RecipeError: It exists, or cannot be written.
    """
    try:
        with path.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError as error:
        raise RecipeError(f"{path}: exists", hint="choose another -o") from error
    except OSError as error:
        raise RecipeError(f"{path}: cannot be written: {error.strerror or error}") from error
