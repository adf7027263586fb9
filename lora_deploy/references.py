"""What names adapters and bases: a path, a hub id, or what an adapter says of itself.

A local path wins over a hub id of the same name. Promise: a base is never guessed: it is named by the user or by the
adapter, and adapters that name different ones are an error.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import TypeAlias

from lora_deploy.adapter import Adapter, BaseHint
from lora_deploy.adapters.interface import ReadOptions
from lora_deploy.adapters.open import read_adapter
from lora_deploy.bases.hub import is_hub_id, local_folder
from lora_deploy.bases.quantised import sixteen_bit_original
from lora_deploy.errors import InputError, RecipeError
from lora_deploy.updates.replacement import Replacement

_ADAPTER_FILES = ("adapter_*", "*.safetensors", "*.bin", "*.json", "*.txt", "*.jinja", "*.model")
"""What of an adapter's hub repository is fetched: weights, configuration, and what may travel with them."""

_NAME = re.compile(r"\w[\w.+-]*")

Reference: TypeAlias = "str | PathLike[str]"
"""A path, or a hub id ``owner/name[@revision]``."""
References: TypeAlias = "Reference | Sequence[Reference]"


def named_base(adapters: Sequence[Adapter], *, dequantize: bool = False) -> str:
    """Find the base that adapters name or carry; with ``dequantize`` it may be a quantised one.

    Raises:
        RecipeError: None of them does, or they name different ones.
        InputError: By its name it is quantised, and the hint is the 16-bit original's name.
    """
    named = {hint: adapter for adapter in adapters if (hint := _as_reference(adapter.base_hint))}
    if len({hint.partition("@")[0] for hint in named}) > 1 or len({hint for hint in named if "@" in hint}) > 1:
        listed = ", ".join(f"{adapter.name} names {hint}" for hint, adapter in named.items())
        raise RecipeError(f"adapters were trained on different bases: {listed}", hint="choose one with --base")
    if named:
        base = max(named, key=lambda hint: "@" in hint)
        if not dequantize:
            _refuse_quantised_name(named[base], base)
        return base
    carriers = {adapter.path for adapter in adapters if _carries_base(adapter)}
    if len(carriers) == 1:
        return str(carriers.pop())
    paths = ", ".join(str(adapter.path) for adapter in adapters)
    raise RecipeError(
        f"{paths}: names no base, neither in its configuration nor in its header", hint="pass --base", code="no-base"
    )


def _as_reference(hint: BaseHint) -> str:
    if not hint.name:
        return ""
    return f"{hint.name}@{hint.revision}" if hint.revision and not Path(hint.name).exists() else hint.name


def _refuse_quantised_name(adapter: Adapter, base: str) -> None:
    original = None if Path(base).exists() else sixteen_bit_original(base.partition("@")[0])
    if original is not None:
        raise InputError(
            f"{adapter.path}: was trained on {base}, which is quantised: packed weights cannot take an update",
            hint=f"merge it into the 16-bit original: --base {original}, or unpack this one: --dequantize",
            code="quantised-base",
        )


def _carries_base(adapter: Adapter) -> bool:
    """Whether the file holds every tensor that it changes: one state dict with the LoRA parameters in it."""
    changed = {entry.target for entry in adapter.updates if not isinstance(entry.update, Replacement)}
    return bool(changed) and changed <= adapter.base_names


def read_named(adapter: Reference, options: ReadOptions | None) -> Adapter:
    """Read an adapter from where a path or a hub id leads."""
    path = Path(adapter).expanduser()
    if not path.exists() and is_hub_id(fspath(adapter)):
        path, _ = local_folder(fspath(adapter), _ADAPTER_FILES)
        if options and options.adapter_name:  # PEFT saves adapters of other names than "default" in sub-folders
            local_folder(fspath(adapter), _ADAPTER_FILES, within=options.adapter_name)
    return read_adapter(path, options)


def named_reference(reference: Reference) -> tuple[str | None, Reference]:
    """Take ``NAME=PATH`` apart; a path that exists is one, whatever it contains.

    Raises:
        RecipeError: The name cannot be a file's.
    """
    text = fspath(reference)
    name, equals, path = text.partition("=")
    if not equals or Path(text).expanduser().exists():
        return None, reference
    if not _NAME.fullmatch(name):
        raise RecipeError(f"{text}: found name {name!r}, expected letters, digits, '.', '_', '+' and '-'")
    return name, path


def several(references: References) -> Sequence[Reference]:
    """Give one or several references as several."""
    return [references] if isinstance(references, str | PathLike) else references
