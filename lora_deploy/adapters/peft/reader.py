"""The PEFT reader: a LORA adapter's folder, file or raw state dict becomes updates in the file's own terms.

Promise: alpha, rank patterns, variants and saved heads end here; every tensor of the file is in one update, in one copy
of the base's, or counted by a finding that says why not.
Source: peft 0.21.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_deploy.adapter import Adapter, BaseHint, ModuleUpdate
from lora_deploy.adapters.alpha import metadata_alpha, missing_alpha
from lora_deploy.adapters.diffusion.keys import format_of
from lora_deploy.adapters.header import CONFIGURATION, by_component, header_configuration
from lora_deploy.adapters.interface import AdapterFile, ReadOptions
from lora_deploy.adapters.keys import PEFT_SLOT
from lora_deploy.adapters.peft.config import PeftConfig, parse_config, refuse_unmergeable
from lora_deploy.adapters.peft.findings import find_surprises
from lora_deploy.adapters.peft.key_table import KeyTable, sort_keys
from lora_deploy.adapters.peft.modules import ModuleReader
from lora_deploy.adapters.peft.saved import read_copies, read_saved_tensors, read_token_rows
from lora_deploy.adapters.peft.scale import Scales
from lora_deploy.adapters.peft.tying import apply_tied_once
from lora_deploy.adapters.torchtune_signs import is_export, is_own
from lora_deploy.adapters.tuners import TUNERS
from lora_deploy.adapters.tuners.reader import read_tuner
from lora_deploy.artifact import cached_sha256
from lora_deploy.errors import MalformedAdapterError


class PeftReader:
    """Reads PEFT's adapters: LORA here, the other tuners by their own modules."""

    format = "peft"

    def recognises(self, file: AdapterFile) -> bool:
        """Whether the configuration is PEFT's, or there is none and the keys are."""
        if is_own(file) or is_export(file) or format_of(file):
            return False
        if file.config is not None and ("peft_type" in file.config or "lora_alpha" in file.config):
            return True
        return any(PEFT_SLOT.search(key) for key in file.tensors)

    def read(self, file: AdapterFile, options: ReadOptions) -> Adapter:
        """Turn the file into updates.

        Raises:
            InputError: The content breaks PEFT's rules, or cannot be merged.
            RecipeError: An option asks for what the file does not hold.
            NonFiniteTensorError: A tensor holds a NaN or an infinity.
        """
        raw, source = _configuration(file)
        tuner = next((entry for entry in TUNERS if raw is not None and entry.name == raw.get("peft_type")), None)
        if tuner is not None and raw is not None:
            return read_tuner(file, options, tuner.load(), raw)
        config = PeftConfig() if raw is None else parse_config(raw, file.config_path or file.path)
        refuse_unmergeable(config, file.config_path or file.path, base_is_residual=options.base_is_residual)
        table = sort_keys(file.path, file.tensors, options.adapter_name)
        if not (table.modules or table.tokens):
            raise MalformedAdapterError(
                f"{file.path}: none of its {len(file.tensors)} tensors is LoRA's, first {next(iter(file.tensors))}",
                hint="name the adapter's weights; is this a base?",
            )
        scales = _scales(file, config, raw, source, options)
        adapted = ModuleReader(
            file=file,
            config=config,
            scales=scales,
            base_is_residual=options.base_is_residual,
            modules=table.modules,
        )
        updates = apply_tied_once(
            (*read_saved_tensors(file, table), *adapted.updates(), *read_token_rows(file, table, config))
        )
        copies = read_copies(file, table)
        _check_complete(file, table, (*updates, *copies))
        return Adapter(
            path=file.path,
            name=file.name,
            format=self.format,
            base_hint=BaseHint(name=(config.base_model_name_or_path or "").strip() or None, revision=config.revision),
            updates=updates,
            base_copies=copies,
            findings=tuple(find_surprises(file, config, table, scales, updates, options)),
            sha256=file.sha256,
            config_sha256=cached_sha256(file.config_path) if file.config_path else None,
            config=raw or {},
            layer_replication=config.layer_replication or (),
        )


READER = PeftReader()


def _configuration(file: AdapterFile) -> tuple[Mapping[str, Any] | None, str]:
    """Give the configuration and where it was read: the file beside the weights, or their header."""
    if file.config is not None and file.config_path is not None:
        return file.config, file.config_path.name
    config = header_configuration(file)
    if config is None:
        return None, f"{file.path.name}'s header"
    if "lora_alpha" not in config:  # a pipeline's metadata: each key behind the name of its component
        parts = by_component(config)
        if len(parts) == 1:
            (config,) = parts.values()
    return config, f"metadata {CONFIGURATION}"


def _scales(
    file: AdapterFile, config: PeftConfig, raw: Mapping[str, Any] | None, source: str, options: ReadOptions
) -> Scales:
    """Say where alpha comes from; a file that names none needs the user's.

    Raises:
        MalformedAdapterError: No alpha anywhere.
    """
    if raw is not None:
        has_alpha = "lora_alpha" in raw
        return Scales(path=file.path, config=config, config_name=source, has_alpha=has_alpha, alpha=options.alpha)
    found = metadata_alpha(file)
    if found is not None:
        config = config.model_copy(update={"lora_alpha": found[1]})
        source = f"metadata {found[0]}"
    elif options.alpha is None:
        raise missing_alpha(file, (file.tensors[key].shape[0] for key in file.tensors if _is_down(key)))
    return Scales(
        path=file.path,
        config=config,
        config_name=source,
        has_rank=False,
        has_alpha=found is not None,
        alpha=options.alpha,
    )


def _is_down(key: str) -> bool:
    return PEFT_SLOT.search(key) is not None and ("lora_A" in key or "lora_embedding_A" in key)


def _check_complete(file: AdapterFile, table: KeyTable, updates: tuple[ModuleUpdate, ...]) -> None:
    """Check that every key of the file is accounted for once."""
    used = [key for update in updates for key in update.keys]
    used += [key for keys in table.ignored.values() for key in keys]
    twice = sorted({key for key in used if used.count(key) > 1}) if len(used) != len(set(used)) else []
    missing = sorted(set(file.tensors) - set(used))
    if twice or missing:
        fault = f"{missing[0]} is not used" if missing else f"{twice[0]} is used twice"
        raise MalformedAdapterError(f"{file.path}: {len(missing) + len(twice)} tensors are left over, first: {fault}")
