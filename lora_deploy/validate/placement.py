"""Give every update of an adapter the tensor, or the parts of tensors, that its name means in this base."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lora_deploy.adapter import Adapter, Experts, ModuleUpdate, Naming
from lora_deploy.names import AmbiguousNameError, Part
from lora_deploy.updates.replacement import Replacement
from lora_deploy.validate.base import Base
from lora_deploy.validate.choice import Choice
from lora_deploy.validate.experts import place_experts
from lora_deploy.validate.findings import Findings
from lora_deploy.validate.flattened import unflattened
from lora_deploy.validate.language_model import name_in_language_model
from lora_deploy.validate.positional import named_by_position

_HEAD = re.compile(
    r"^(score|classifier|classification_head|pre_classifier|qa_outputs|lm_head|v_head|summary|sequence_summary|"
    r"logits_proj|cls|head|reward_head|value_head|regression_head|projector|pooler)\."
)
"""Modules on top of a model that a base saved without its head does not have; canonical names."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Placed:
    """An update and one place it goes to; an update of fused rows has several."""

    module_update: ModuleUpdate
    part: Part


def place(
    adapter: Adapter, updates: Sequence[ModuleUpdate], base: Base, choice: Choice, findings: Findings
) -> list[Placed]:
    """Place the chosen updates of one adapter; what has no place becomes a finding."""
    if adapter.naming is Naming.POSITIONAL:
        updates = named_by_position(adapter, updates, base, findings)
    elif adapter.naming is Naming.FLATTENED:
        updates = [*unflattened(updates, base, choice, findings)]
    placed: list[Placed] = []
    added: set[str] = set()
    experts: list[ModuleUpdate] = []
    # Replacements first: what a file adds to the base, its other updates may change.
    for module_update in sorted(updates, key=lambda update: not isinstance(update.update, Replacement)):
        if isinstance(module_update.update, Experts):
            experts.append(module_update)
            continue
        parts = _find(adapter, module_update, base, added, choice, findings)
        placed += (Placed(module_update=module_update, part=part) for part in parts)
    placed += (
        Placed(module_update=u, part=part) for u, part in place_experts(adapter, experts, base, choice, findings)
    )
    placed = [item for item in placed if choice.takes(item.part.tensor, item.module_update.keys)]
    _refuse_mixed_dialects(adapter, placed, base, findings)
    return placed


def _find(
    adapter: Adapter, module_update: ModuleUpdate, base: Base, added: set[str], choice: Choice, findings: Findings
) -> Sequence[Part]:
    name, keys = module_update.target, module_update.keys
    try:
        parts = _one_of(module_update, base)
    except AmbiguousNameError as error:
        if choice.takes(name, keys):
            findings.error("ambiguous-target", name, str(error), keys)
        return ()
    if parts is not None:
        return parts
    if name in added:
        return (Part(tensor=name),)
    if isinstance(module_update.update, Replacement) and _is_head(adapter, name, base):
        added.add(name)
        return (Part(tensor=name),)
    if not module_update.is_optional and choice.takes(name, keys):
        findings.error(*_missing(name, base), keys)
    return ()


def _one_of(module_update: ModuleUpdate, base: Base) -> Sequence[Part] | None:
    """Find what one of the names means.

    Raises:
        AmbiguousNameError: A name means several tensors, or two names mean different ones.
    """
    found = {
        name: parts
        for name in (module_update.target, *module_update.alternatives)
        if (parts := _find_one(name, base)) is not None
    }
    if len({tuple(map(repr, parts)) for parts in found.values()}) > 1:
        raise AmbiguousNameError(f"base has {' and '.join(found)}: each may be meant")
    return next(iter(found.values()), None)


def _find_one(name: str, base: Base) -> Sequence[Part] | None:
    for candidate in _candidates(name):
        parts = base.index.find(candidate)
        if parts is not None:
            return parts
        if (tie := base.absent_member(candidate)) is not None:
            return (Part(tensor=tie.member),)
    return None


def _candidates(name: str) -> Iterator[str]:
    """The name itself, then what a module without a ``weight`` calls it (attention's fused input projection)."""
    yield name
    module, _, slot = name.rpartition(".")
    if slot == "weight":
        yield f"{module}.in_proj_weight"
        yield module


def _is_head(adapter: Adapter, name: str, base: Base) -> bool:
    canonical = base.index.canonical(name)
    top = canonical.partition(".")[0]
    if any(stored.startswith(f"{top}.") for stored in map(base.index.canonical, base.specs)):
        return False
    saved = adapter.config.get("modules_to_save") or ()
    module = canonical.rpartition(".")[0]
    parents = [module.rsplit(".", k)[0] for k in range(module.count(".") + 1)]
    return bool(_HEAD.match(canonical)) or any(p == s or p.endswith(f".{s}") for p in parents for s in saved)


def _missing(name: str, base: Base) -> tuple[str, str, str]:
    module, _, slot = name.rpartition(".")
    if slot == "bias" and base.index.find(f"{module}.weight") is not None:
        return "bias-missing", name, "the adapter trained a bias here, base has none: no tensor could hold it"
    if (inner := name_in_language_model(name, base)) is not None:
        return "text-model-target", name, f"not in base; its language model has {inner}"
    nearest = base.index.nearest(name)
    hint = f"; nearest: {', '.join(nearest)}" if nearest else ""
    return "target-missing", name, f"not in base{hint}"


def _refuse_mixed_dialects(adapter: Adapter, placed: Sequence[Placed], base: Base, findings: Findings) -> None:
    """Names of one tower come from one library version: on-disk names beside renamed ones fit by accident."""
    as_stored: dict[str, str] = {}
    renamed: dict[str, str] = {}
    for item in placed:
        name, stored = item.module_update.target, item.part.tensor
        if item.part.region is not None or item.part.rows is not None or stored not in base.specs:
            continue
        canonical = base.index.canonical(stored)
        is_alias = base.index.canonical(name) != canonical  # another word for it, in every version
        if not (is_alias or stored.endswith(canonical)):  # this tensor has another name in another version
            (as_stored if name == stored else renamed).setdefault(canonical.partition(".")[0], name)
    for tower in as_stored.keys() & renamed.keys():
        findings.error(
            "mixed-names",
            adapter.name,
            f"names of two library versions: {as_stored[tower]} is the base's own, {renamed[tower]} another version's",
        )


def with_target(module_update: ModuleUpdate, part: Part) -> ModuleUpdate:
    """Point an update at its place."""
    return replace(module_update, target=part.tensor, region=part.region)
