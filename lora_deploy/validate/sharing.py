"""Tied tensors: what training changed on one side only gets a tensor of its own; what it changed alike stays tied.

PEFT trains the side it wraps and leaves the other as it was, though merging in place changes both. The law here is the
forward pass that training saw.
Source: reference A.10; peft 0.21.2 (``ensure_weight_tying``, ``trainable_token_indices``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from lora_deploy.adapter import Adapter, ModuleUpdate
from lora_deploy.names import Tie
from lora_deploy.updates.replacement import Replacement
from lora_deploy.updates.token_rows import TokenRows
from lora_deploy.validate.base import Base
from lora_deploy.validate.findings import Findings
from lora_deploy.validate.fit import same_values

if TYPE_CHECKING:
    from torch import Tensor

Updates = dict[str, list[ModuleUpdate]]


def share(
    updates: Updates, outputs: dict[str, str | None], adapters: Sequence[Adapter], base: Base, findings: Findings
) -> Mapping[str, Any]:
    """Settle every tie that an update touches, in place; give the edits of the configuration."""
    edits: dict[str, Any] = {}

    def is_of_both(update: ModuleUpdate) -> bool:
        adapter = adapters[update.adapter_index]
        return _is_shared_kind(update, base) or adapter.shares_ties or bool(adapter.config.get("ensure_weight_tying"))

    for tie in base.ties:
        source, member = updates.get(tie.source, []), updates.get(tie.member, [])
        if not (source or member) or not (member or tie.is_present) or not base.is_shared(tie):
            continue
        if source and member and are_equal(source, member):
            _keep_tied(tie, updates)
        elif not (source and member) and all(map(is_of_both, source or member)):
            _change_both(tie, updates)
        elif tie.is_breakable:
            _untie(tie, updates, outputs, base, findings)
            edits |= _flag_edits(base.config)
        else:
            changed, other = (tie.source, tie.member) if source else (tie.member, tie.source)
            keys = [key for update in (*source, *member) for key in update.keys]
            message = f"this model always shares it with {other}, which the adapter does not change alike"
            findings.error("tie-unbreakable", changed, message, keys)
    return edits


def _change_both(tie: Tie, updates: Updates) -> None:
    """Give what was saved under one name to the stored matrix, and to a copy of it where the file holds one."""
    both = updates.pop(tie.member, None) or updates[tie.source]
    updates[tie.source] = [replace(update, target=tie.source) for update in both]
    if tie.is_stored:
        updates[tie.member] = [replace(update, target=tie.member) for update in both]


def _keep_tied(tie: Tie, updates: Updates) -> None:
    """Apply once: the member's keys are consumed by the source's equal updates."""
    if tie.is_stored:
        return
    member = updates.pop(tie.member)
    updates[tie.source] = [
        replace(one, keys=(*one.keys, *other.keys)) for one, other in zip(updates[tie.source], member, strict=True)
    ]


def _untie(tie: Tie, updates: Updates, outputs: dict[str, str | None], base: Base, findings: Findings) -> None:
    source, member = updates.get(tie.source, []), updates.get(tie.member, [])
    outputs[tie.member] = base.stack[tie.member if tie.is_stored else tie.source]
    # Rows and sizes that training gave to the shared matrix are both sides'.
    for one, other in ((source, member), (member, source)):
        if not any(isinstance(update.update, Replacement) for update in other):
            common = [update for update in one if _is_shared_kind(update, base)]
            other[:0] = [replace(u, target=tie.member if other is member else tie.source) for u in common]
    updates[tie.source], updates[tie.member] = source, member
    for name in (tie.source, tie.member):
        if not updates[name]:
            del updates[name]
    changed = tie.member if member and not source else tie.source
    other_name = tie.source if changed == tie.member else tie.member
    findings.warn("tied-target", changed, f"base ties it to {other_name}; in the merged model each has its own tensor")


def _is_shared_kind(module_update: ModuleUpdate, base: Base) -> bool:
    """Whether PEFT applies this update to the shared matrix itself: trained token rows, a resized vocabulary."""
    update = module_update.update
    if isinstance(update, Replacement):
        spec = base.spec(module_update.target)
        return spec is None or spec.shape != tuple(update.values.shape)
    return isinstance(update, TokenRows)


def are_equal(source: Sequence[ModuleUpdate], member: Sequence[ModuleUpdate]) -> bool:
    """Whether two tensors get the same updates, value for value."""
    return len(source) == len(member) and all(
        one.adapter_index == other.adapter_index
        and type(one.update) is type(other.update)
        and all(_same(getattr(one.update, f.name), getattr(other.update, f.name)) for f in fields(one.update))
        for one, other in zip(source, member, strict=True)
    )


def _same(one: object, other: object) -> bool:
    if hasattr(one, "dtype") and hasattr(other, "dtype"):
        left: Tensor = one  # type: ignore[assignment]
        return same_values(left, other)  # type: ignore[arg-type]
    if hasattr(one, "factor") and hasattr(other, "factor"):
        return (one.factor, getattr(one, "root", 1)) == (other.factor, getattr(other, "root", 1))
    return one == other


def _flag_edits(config: Mapping[str, Any], prefix: str = "") -> dict[str, bool]:
    edits = {} if prefix else {"tie_word_embeddings": False}
    for key, value in config.items():
        if key == "tie_word_embeddings" and prefix and value is True:
            edits[prefix + key] = False
        elif isinstance(value, Mapping):
            edits |= _flag_edits(value, f"{prefix}{key}.")
    return edits
