"""What is worth knowing about a PEFT file that can be read: each surprise is one finding, never one a tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lora_deploy.adapter import ModuleUpdate
from lora_deploy.adapters.factors import is_zero
from lora_deploy.adapters.interface import AdapterFile, ReadOptions
from lora_deploy.adapters.peft.config import PeftConfig
from lora_deploy.adapters.peft.key_table import KeyTable, without_base_layer
from lora_deploy.adapters.peft.scale import Scales
from lora_deploy.adapters.torchtune_signs import has_exports_configuration
from lora_deploy.errors import Finding, Severity
from lora_deploy.updates.dora import Dora
from lora_deploy.updates.low_rank import LowRank
from lora_deploy.updates.residual import WithoutComponent

_AUTOMATIC_HEADS = frozenset({"classifier", "score"})
"""PEFT lists both for classifiers; a model has one of them."""


def find_surprises(
    file: AdapterFile,
    config: PeftConfig,
    table: KeyTable,
    scales: Scales,
    updates: Sequence[ModuleUpdate],
    options: ReadOptions,
) -> Iterator[Finding]:
    """Yield the findings of one file, the weighty ones first."""
    yield from _of_configuration(file, config, table, scales, options)
    yield from _of_saved_tensors(config, table)
    yield from _of_updates(file, config, updates)
    for reason, keys in table.ignored.items():
        yield _note("unused-tensors", keys[0], f"{len(keys)} tensors are left out: {reason}")


def _of_configuration(
    file: AdapterFile, config: PeftConfig, table: KeyTable, scales: Scales, options: ReadOptions
) -> Iterator[Finding]:
    name = scales.config_name
    if options.alpha is not None and scales.has_alpha:
        yield _warn("alpha-overridden", name, f"--alpha {options.alpha:g} is used instead of the file's own alpha")
    elif not scales.has_alpha and scales.has_rank:
        yield _warn("alpha-default", name, f"names no lora_alpha: PEFT's default {config.lora_alpha} is used")
    if file.config is not None and file.config.get("peft_type") is None:
        yield _warn("type-missing", name, "names no peft_type: read as LORA, by its lora_alpha")
    if not scales.has_rank:
        yield _warn("no-configuration", file.path.name, "no configuration: plain initialisation and alpha / r assumed")
    if config.is_newer_than_known:
        yield _warn("newer-peft", name, f"written by peft {config.peft_version}; this reader knows peft <= 0.21.2")
    for key in scales.unmatched(_pattern_names(config, table)):
        yield _warn("pattern-unmatched", name, f"rank_pattern or alpha_pattern {key!r} matches no module of the file")
    contested = scales.contested(_pattern_names(config, table)) if options.alpha is None else []
    if contested:
        module, keys = contested[0]
        values = ", ".join(f"{key!r} {config.alpha_pattern[key]}" for key in keys)
        yield _warn(
            "pattern-order",
            module,
            f"alpha_pattern matches {len(contested)} modules more than once ({values}): the first in the file is used, "
            "as PEFT does when it loads; PEFT sorts them when it saves, training used the first as it was configured",
        )
    if has_exports_configuration(file) and "qwen" in (config.base_model_name_or_path or "").lower():
        yield _warn(
            "torchtune-rows",
            name,
            "has just the fields that torchtune writes: if it did, the rows of q and k are in the wrong order for "
            "Qwen; merge torchtune's own adapter_model.pt",
        )
    if config.megatron_config is not None:
        yield _warn("tensor-parallel", name, "trained tensor-parallel: one rank's file may hold a part of each factor")


def _pattern_names(config: PeftConfig, table: KeyTable) -> Iterator[str]:
    for module in map(without_base_layer, table.modules):
        yield module
        yield from (f"{module}.{parameter}" for parameter in config.adapts_parameters_of(module))


def _of_saved_tensors(config: PeftConfig, table: KeyTable) -> Iterator[Finding]:
    listed = config.modules_to_save or ()
    if config.bias == "lora_only" and not any(name.endswith(".bias") for name in table.tensors):
        yield _warn(
            "bias-lost", "bias", "bias is lora_only but the file holds none: peft <= 0.20 trained them and did not save"
        )
    absent = [name for name in listed if not any(_is_within(target, name) for target in table.tensors)]
    if set(absent) <= _AUTOMATIC_HEADS and len(absent) < len(set(listed)):
        absent = []
    for name in dict.fromkeys(absent):
        yield _warn("saved-module-absent", name, "is in modules_to_save, but the file holds no tensor of it")
    unlisted = [
        target
        for target in table.tensors
        if not any(_is_within(target, name) for name in listed)
        and not (config.bias != "none" and target.endswith("bias"))
    ]
    if unlisted:
        yield _note(
            "saved-unlisted",
            unlisted[0],
            f"{len(unlisted)} whole tensors that modules_to_save does not name replace the base's",
        )
    if table.copies:
        first = next(iter(table.copies))
        yield _note(
            "base-copies", first, f"{len(table.copies)} copies of base tensors below a change of them: not used"
        )


def _of_updates(file: AdapterFile, config: PeftConfig, updates: Sequence[ModuleUpdate]) -> Iterator[Finding]:
    pairs = [(update.target, found) for update in updates if (found := _factors(update)) is not None]
    untrained = [target for target, factors in pairs if is_zero(factors)]
    if untrained:
        yield _warn(
            "untrained",
            untrained[0],
            f"{len(untrained)} of {len(pairs)} modules have a factor that is all zero: they change nothing",
        )
    tied = next((update for update in updates if _holds_a_twin(update)), None)
    if tied is not None:
        yield _note("tied-once", tied.target, "saved for the embedding and for the tied head: applied once")
    elif config.ensure_weight_tying and any("lora_embedding_A" in key for key in file.tensors):
        yield _warn(
            "tying-unclear", file.path.name, "ensure_weight_tying is set, but no head has the embedding's factors"
        )


def _holds_a_twin(update: ModuleUpdate) -> bool:
    return (
        isinstance(update.update, LowRank)
        and any("lora_A" in key for key in update.keys)
        and any("lora_embedding_A" in key for key in update.keys)
    )


def _factors(update: ModuleUpdate) -> LowRank | None:
    found = update.update
    found = found.inner if isinstance(found, Dora) else found
    found = found.low_rank if isinstance(found, WithoutComponent) else found
    return found if isinstance(found, LowRank) else None


def _is_within(target: str, module: str) -> bool:
    return f".{module}." in f".{target}"


def _warn(code: str, target: str, message: str) -> Finding:
    return Finding(code=code, severity=Severity.WARN, target=target, message=message)


def _note(code: str, target: str, message: str) -> Finding:
    return Finding(code=code, severity=Severity.NOTE, target=target, message=message)
