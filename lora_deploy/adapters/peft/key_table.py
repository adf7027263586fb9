"""The key grammar of PEFT files: every key of a file gets exactly one meaning, or the file is refused.

    [wrappers] base_model.model.<module path>.<slot>[.<adapter name>][.weight | .bias]

Source: peft 0.21.2, ``utils/save_and_load.py``; raw state dicts keep the adapter's name, saved files do not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from lora_deploy.adapters.keys import is_computed_buffer, unwrapped
from lora_deploy.errors import AmbiguousAdapterFormatError, MalformedAdapterError, RecipeError, UnmergeableAdapterError

_FACTOR = re.compile(
    r"(?:(?P<module>.+)\.)?"
    r"(?:(?P<slot>lora_[AB])(?:\.(?P<name>[^.]+))?\.(?P<parameter>weight|bias)"
    r"|(?P<bare>lora_embedding_[AB]|lora_diag)(?:\.(?P<bare_name>[^.]+))?"
    r"|(?P<magnitude>lora_magnitude_vector)(?:\.(?!weight$)(?P<magnitude_name>[^.]+))?(?:\.weight)?)$"
)
_TOKENS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta(?:\.(?P<name>[^.]+))?$")
_SAVED = re.compile(r"(?P<module>.+)\.modules_to_save\.(?P<name>[^.]+)\.(?P<parameter>.+)$")
_SAVED_TWICE = re.compile(r"(?P<module>.+)\.modules_to_save\.(?P<parameter>[^.]+)$")
"""An embedding that is resized and in ``modules_to_save``: PEFT saves it once under its name and once like this."""
_ORIGINAL = re.compile(r"\.original_module\.|\.token_adapter\.trainable_tokens_original(\.|$)")
_TRAINING_ONLY = re.compile(r"\.lora_(velora_\w+|monteclora_sampler)(\.|$)|\.lora_dropout\.")
_PROMPT = re.compile(r"(^|\.)(prompt_embeddings|prompt_encoder|adaption_prompt|adaption_gate)(\.|$)")
_SHARED = re.compile(r"base_model\.(?!model\.)")
_ANY_SLOT = re.compile(r"(^|\.)lora_[A-Za-z]\w*(\.|$)")


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyTable:
    """Every key of one file, sorted by what it means."""

    modules: dict[str, dict[str, str]] = field(default_factory=dict)
    """Module path (with its ``base_layer`` components) to key by slot: ``lora_A``, ``lora_B``, ``lora_B.bias`` …"""
    tokens: dict[str, str] = field(default_factory=dict)
    """Embedding to the key of its trained rows."""
    tensors: dict[str, str] = field(default_factory=dict)
    """Tensor name in the base model to the key of a whole tensor that training saved."""
    copies: dict[str, str] = field(default_factory=dict)
    """Tensor name in the base model to the key of a copy of the base's own, below a change that the file also holds."""
    ignored: dict[str, list[str]] = field(default_factory=dict)
    """Reason to the keys that nothing depends on."""

    def ignore(self, reason: str, key: str) -> None:
        """Put a key aside, with the reason."""
        self.ignored.setdefault(reason, []).append(key)


def sort_keys(path: Path, keys: Iterable[str], adapter_name: str | None) -> KeyTable:
    """Give every key its meaning; ``adapter_name`` chooses among several adapters of one file.

    Raises:
        MalformedAdapterError: A key that no PEFT version writes, or two keys for one slot.
        UnmergeableAdapterError: Tensors of a prompt method.
        AmbiguousAdapterFormatError: Several adapters and no choice.
        RecipeError: A choice that the file does not hold.
    """
    names = unwrapped(path, keys)
    chosen = _choose(path, names.values(), adapter_name)
    table = KeyTable()
    plain = {key: name for key, name in names.items() if not _sort_slot(path, table, key, name, chosen)}
    for key, name in plain.items():
        second = _SAVED_TWICE.match(name)
        name_once = f"{second['module']}.{second['parameter']}" if second else name
        if second and name_once in plain.values():
            table.ignore("saved a second time, under its own name too", key)
        else:
            _sort_plain(path, table, key, name_once)
    return table


def _adapter_name(name: str) -> str | None:
    factor = _FACTOR.match(name)
    if factor:
        return factor["name"] or factor["bare_name"] or factor["magnitude_name"]
    other = _TOKENS.match(name) or _SAVED.match(name)
    return other["name"] if other else None


def _choose(path: Path, names: Iterable[str], adapter_name: str | None) -> str | None:
    held = sorted({found for name in names if (found := _adapter_name(name)) is not None})
    if adapter_name is not None and held and adapter_name not in held:
        raise RecipeError(f"{path}: no adapter {adapter_name!r} in the file, it holds {', '.join(held)}")
    if len(held) > 1 and adapter_name is None:
        raise AmbiguousAdapterFormatError(
            f"{path}: holds {len(held)} adapters: {', '.join(held)}", hint="choose one with --adapter-name"
        )
    return adapter_name or (held[0] if held else None)


def _sort_slot(path: Path, table: KeyTable, key: str, name: str, chosen: str | None) -> bool:
    """Sort a key that is an adapter's own; say whether it was one."""
    if _PROMPT.search(name):
        raise UnmergeableAdapterError(f"{path}: {key}: virtual tokens of a prompt method cannot be merged into weights")
    if _ORIGINAL.search(f".{name}"):
        table.ignore("the original of a module that training replaced", key)
        return True
    if _TRAINING_ONLY.search(f".{name}"):
        table.ignore("used in training only (VeLoRA, MonteCLoRA)", key)
        return True
    if _adapter_name(name) not in {None, chosen}:
        table.ignore(f"of another adapter than {chosen!r}", key)
        return True
    factor = _FACTOR.match(name)
    tokens, saved = _TOKENS.match(name), _SAVED.match(name)
    if factor:
        slot = factor["slot"] or factor["bare"] or factor["magnitude"]
        slot += ".bias" if factor["parameter"] == "bias" else ""
        _put(path, table.modules.setdefault(factor["module"] or "", {}), slot, key)
    elif tokens:
        _put(path, table.tokens, without_base_layer(tokens["module"]), key)
    elif saved:
        if _ANY_SLOT.search(saved["parameter"]):
            raise MalformedAdapterError(f"{path}: {key}: LoRA inside a module that is saved whole is not PEFT's")
        _put(path, table.tensors, f"{saved['module']}.{saved['parameter']}", key)
    elif _ANY_SLOT.search(name) or _SHARED.match(name):
        raise MalformedAdapterError(f"{path}: {key}: no tensor that peft <= 0.21.2 writes for LORA")
    else:
        return False
    return True


def _sort_plain(path: Path, table: KeyTable, key: str, name: str) -> None:
    """Sort a whole tensor: below a change of itself it is a copy of the base's, else training saved it."""
    target = without_base_layer(name.replace(".token_adapter.base_layer.", "."))
    owner, _, parameter = target.rpartition(".")
    if is_computed_buffer(target):
        table.ignore("a buffer that the model computes itself", key)
    elif parameter != "bias" and name != target and _is_changed(table, owner):
        _put(path, table.copies, target, key)
    else:
        _put(path, table.tensors, target, key)


def _is_changed(table: KeyTable, owner: str) -> bool:
    return owner in table.tokens or any(without_base_layer(module) == owner for module in table.modules)


def without_base_layer(path: str) -> str:
    """Remove the ``base_layer`` components that PEFT's wrappers add to a path."""
    return ".".join(part for part in path.split(".") if part != "base_layer")


def _put(path: Path, table: dict[str, str], name: str, key: str) -> None:
    if name in table:
        raise MalformedAdapterError(f"{path}: {table[name]} and {key} both give {name}")
    table[name] = key
