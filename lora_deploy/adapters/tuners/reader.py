"""The file of any tuner: each key sorted by the tuner's own names, whatever else is there read as LORA's files are.

Promise: every tensor of the file is in an update, or counted by a finding that says why not.
Source: peft 0.21.2, ``utils/save_and_load.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_deploy.adapter import Adapter, BaseHint, ModuleUpdate
from lora_deploy.adapters.adapted import Adapted
from lora_deploy.adapters.interface import AdapterFile, ReadOptions
from lora_deploy.adapters.keys import unwrapped
from lora_deploy.adapters.peft.key_table import sort_keys
from lora_deploy.adapters.peft.saved import read_saved_tensors
from lora_deploy.adapters.tuners.config import TunerConfig, parse_config
from lora_deploy.adapters.tuners.interface import Reading, Tuner
from lora_deploy.artifact import cached_sha256
from lora_deploy.errors import AmbiguousAdapterFormatError, Finding, MalformedAdapterError, RecipeError, Severity

_SHARED_ROOT = "base_model."


@dataclass(slots=True, kw_only=True)
class _Sorted:
    """Keys of a file by what they are."""

    modules: dict[str, dict[str, str]] = field(default_factory=dict)
    """Module path to slot to key."""
    shared: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, list[str]] = field(default_factory=dict)
    """Reason to keys."""
    rest: list[str] = field(default_factory=list)


def read_tuner(file: AdapterFile, options: ReadOptions, tuner: Tuner, raw: Mapping[str, Any]) -> Adapter:
    """Turn the file of a tuner into updates.

    Raises:
        InputError: The content breaks the tuner's rules, or cannot be merged.
        RecipeError: An option asks for what the file does not hold.
        NonFiniteTensorError: A tensor holds a NaN or an infinity.
    """
    config = parse_config(tuner.config, raw, file.config_path or file.path)
    keys = _sort(file, tuner, options.adapter_name)
    if not keys.modules and not keys.shared:
        raise MalformedAdapterError(
            f"{file.path}: none of its {len(file.tensors)} tensors is {tuner.peft_type}'s, "
            f"first {next(iter(file.tensors))}"
        )
    modules = [Adapted(file=file, path=path, slots=slots, shared=keys.shared) for path, slots in keys.modules.items()]
    reading = tuner.read(modules or [Adapted(file=file, path="", slots={}, shared=keys.shared)], config)
    table = sort_keys(file.path, keys.rest, options.adapter_name)
    if table.modules or table.tokens:
        surplus = next(iter([*table.modules, *table.tokens]))
        raise MalformedAdapterError(f"{file.path}: {surplus} has tensors of another tuner than {tuner.peft_type}")
    updates = (*read_saved_tensors(file, table), *reading.updates)
    ignored = {**keys.ignored, **table.ignored}
    _check_complete(file, updates, reading, keys, ignored)
    return Adapter(
        path=file.path,
        name=file.name,
        format="peft",
        base_hint=BaseHint(name=(config.base_model_name_or_path or "").strip() or None, revision=config.revision),
        updates=updates,
        model_wide=reading.model_wide,
        findings=tuple(_findings(file, config, reading, ignored)),
        sha256=file.sha256,
        config_sha256=cached_sha256(file.config_path) if file.config_path else None,
        config=raw,
    )


def _sort(file: AdapterFile, tuner: Tuner, adapter_name: str | None) -> _Sorted:
    """Sort every key; raw state dicts carry the adapter's name behind the tuner's."""
    own = [_pattern(*slot) for slot in tuner.slots]
    shared = [_pattern(*slot) for slot in tuner.shared]
    names = unwrapped(file.path, file.tensors)
    found = {key: _match(name, shared if _is_shared(name) else own) for key, name in names.items()}
    chosen = _choose(file, {match["name"] for match in found.values() if match and match["name"]}, adapter_name)
    keys = _Sorted()
    for key, name in names.items():
        match = found[key]
        copy = next((why for slot, why in tuner.copies.items() if _match(name, [_pattern(*slot)])), None)
        if match and match["name"] not in {None, chosen}:
            keys.ignored.setdefault(f"of another adapter than {chosen!r}", []).append(key)
        elif match:
            of_module = keys.shared if _is_shared(name) else keys.modules.setdefault(match["module"] or "", {})
            _put(file, of_module, match["slot"] + match["rest"], key)
        elif copy:
            keys.ignored.setdefault(copy, []).append(key)
        elif _is_shared(name):
            raise MalformedAdapterError(f"{file.path}: {key}: no tensor that peft <= 0.21.2 writes")
        else:
            keys.rest.append(key)
    return keys


def _is_shared(name: str) -> bool:
    return name.startswith(_SHARED_ROOT)


def _pattern(attribute: str, rest: str) -> re.Pattern[str]:
    return re.compile(rf"(?:(?P<module>.+)\.)?(?P<slot>{attribute})(?:\.(?P<name>[^.]+))?(?P<rest>{rest})")


def _match(name: str, patterns: list[re.Pattern[str]]) -> re.Match[str] | None:
    own = name.removeprefix(_SHARED_ROOT)
    return next((match for pattern in patterns if (match := pattern.fullmatch(own))), None)


def _choose(file: AdapterFile, held: set[str], adapter_name: str | None) -> str | None:
    if adapter_name is not None and held and adapter_name not in held:
        raise RecipeError(f"{file.path}: no adapter {adapter_name!r} in the file, it holds {', '.join(sorted(held))}")
    if len(held) > 1 and adapter_name is None:
        raise AmbiguousAdapterFormatError(
            f"{file.path}: holds {len(held)} adapters: {', '.join(sorted(held))}", hint="choose one with --adapter-name"
        )
    return adapter_name or next(iter(held), None)


def _put(file: AdapterFile, table: dict[str, str], slot: str, key: str) -> None:
    if slot in table:
        raise MalformedAdapterError(f"{file.path}: {table[slot]} and {key} both give {slot}")
    table[slot] = key


def _check_complete(
    file: AdapterFile, updates: tuple[ModuleUpdate, ...], reading: Reading, keys: _Sorted, ignored: Mapping[str, Any]
) -> None:
    """Check that every key of the file is accounted for."""
    used = {key for update in updates for key in update.keys} | {*keys.shared.values()}
    used |= {key for listed in ignored.values() for key in listed}
    if reading.model_wide is not None:
        used |= {*reading.model_wide.keys}
    missing = sorted({*file.tensors} - used)
    if missing:
        raise MalformedAdapterError(f"{file.path}: {len(missing)} tensors are left over, first: {missing[0]}")


def _findings(
    file: AdapterFile, config: TunerConfig, reading: Reading, ignored: Mapping[str, list[str]]
) -> Iterator[Finding]:
    name = file.config_path.name if file.config_path else file.path.name
    if config.is_newer_than_known:
        message = f"written by peft {config.peft_version}; this reader knows peft <= 0.21.2"
        yield Finding(code="newer-peft", severity=Severity.WARN, target=name, message=message)
    for note in reading.notes:
        yield Finding(code="drawn-again", severity=Severity.NOTE, target=file.name, message=note)
    for reason, keys in ignored.items():
        message = f"{len(keys)} tensors are left out: {reason}"
        yield Finding(code="unused-tensors", severity=Severity.NOTE, target=keys[0], message=message)
