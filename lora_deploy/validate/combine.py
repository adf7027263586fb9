"""Several updates of one tensor: their order, what may stand together, and regions that overlap.

Promise: the regions of one tensor's updates are equal or disjoint, and updates of one region apply in the given order:
replacements first, then adapter by adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

from lora_deploy.adapter import Adapter, Experts, ModuleUpdate
from lora_deploy.errors import UnmergeableAdapterError
from lora_deploy.tensors import Region
from lora_deploy.updates.addition import Addition
from lora_deploy.updates.additive import Additive
from lora_deploy.updates.low_rank import LowRank
from lora_deploy.updates.replacement import Replacement
from lora_deploy.updates.token_rows import TokenRows
from lora_deploy.validate.findings import Findings
from lora_deploy.validate.fit import same_values

_ADDITIVE = (LowRank, Addition, Additive)
_FROM_ORIGINAL = frozenset(
    {"residual", "kasa", "subspace", "principal", "joint", "weight-network", "block-affine", "mixed-inputs", "affine"}
)
"""Kinds that depend on the original weight: nothing may change it before."""


def combine(
    name: str, updates: Sequence[ModuleUpdate], adapters: Sequence[Adapter], findings: Findings
) -> tuple[ModuleUpdate, ...]:
    """Order one tensor's updates and make their regions equal or disjoint; what cannot stand together is a finding."""
    replacing = [u for u in updates if isinstance(u.update, Replacement | TokenRows)]
    changing = [u for u in updates if not isinstance(u.update, Replacement | TokenRows)]
    replacing.sort(key=lambda u: isinstance(u.update, TokenRows))
    kept = [*_without_conflicts(name, replacing, adapters, findings), *changing]
    try:
        disjoint = [*_disjoint(kept)]
    except UnmergeableAdapterError as error:
        findings.error("overlapping-parts", name, error.message, [key for u in updates for key in u.keys])
        return ()
    by_region: dict[Region | None, list[ModuleUpdate]] = {}
    for update in disjoint:
        by_region.setdefault(update.region, []).append(update)
    for group in by_region.values():
        _check_together(name, group, adapters, findings)
    return tuple(update for group in by_region.values() for update in group)


def _without_conflicts(
    name: str, replacing: Sequence[ModuleUpdate], adapters: Sequence[Adapter], findings: Findings
) -> Iterator[ModuleUpdate]:
    kept: list[ModuleUpdate] = []
    for update in replacing:
        twin = next((k for k in kept if _same_place(k, update) and type(k.update) is type(update.update)), None)
        if twin is None:
            kept.append(update)
        elif not _say_the_same(twin.update, update.update):
            who = _who(adapters, (twin, update))
            findings.error("replaced-twice", name, f"{who} bring different values for it", (*twin.keys, *update.keys))
        elif isinstance(update.update, TokenRows) and twin.update.indices != update.update.indices:  # type: ignore[union-attr]
            kept.append(update)
        else:
            kept[kept.index(twin)] = replace(twin, keys=(*twin.keys, *update.keys))
    return iter(kept)


def _same_place(one: ModuleUpdate, other: ModuleUpdate) -> bool:
    return one.region == other.region


def _say_the_same(one: object, other: object) -> bool:
    if isinstance(one, TokenRows) and isinstance(other, TokenRows):
        rows = {index: one.values[k] for k, index in enumerate(one.indices)}
        return all(same_values(rows[i], other.values[k]) for k, i in enumerate(other.indices) if i in rows)
    if isinstance(one, Replacement) and isinstance(other, Replacement):
        return same_values(one.values, other.values)
    return False


def _check_together(name: str, group: Sequence[ModuleUpdate], adapters: Sequence[Adapter], findings: Findings) -> None:
    keys = [key for update in group for key in update.keys]
    changing = [u for u in group if not isinstance(u.update, Replacement | TokenRows)]
    for one, other in pairwise(sorted(changing, key=lambda u: u.adapter_index)):
        if one.adapter_index == other.adapter_index and _kind(one) == _kind(other):
            findings.error("hit-twice", name, f"{adapters[one.adapter_index].name} changes it twice", keys)
            return
    special = [u for u in changing if not isinstance(u.update, _ADDITIVE)]
    if len(special) > 1:
        kinds = " and ".join(_kind(u) for u in special)
        message = f"{_who(adapters, special)} change it by {kinds}: each was trained alone, they have no sum"
        findings.error("kinds-collide", name, message, keys)
    elif special and changing[0] is not special[0] and _kind(special[0]) in _FROM_ORIGINAL:
        message = f"a {_kind(special[0])} update starts from the original weight: give its adapter first"
        findings.error("kinds-collide", name, message, keys)
    elif special and len(changing) > 1:
        findings.warn(
            "order-matters", name, f"a {_kind(special[0])} update and others: the result depends on their order"
        )
    if any(u.adapter_index != g.adapter_index for u in group for g in changing if u not in changing):
        findings.warn("replaced-and-changed", name, "one adapter replaces what another changes: replaced first")
    if changing and any(isinstance(u.update, TokenRows) for u in group):
        findings.warn("rows-and-changed", name, "token rows are replaced before the other updates are added")


def _disjoint(updates: Sequence[ModuleUpdate]) -> Iterator[ModuleUpdate]:
    """Cut updates at the row boundaries of the others that overlap them.

    Raises:
        UnmergeableAdapterError: Regions that overlap otherwise than by whole rows, or a kind that cannot be cut.
    """
    regions = sorted({u.region for u in updates if u.region is not None})
    if not any(b.offset < a.stop for a, b in pairwise(regions)):
        yield from updates
        return
    bounds = sorted({bound for region in regions for bound in (region.offset, region.stop)})
    for update in updates:
        region = update.region
        if region is None:
            yield update
            continue
        inner = [region.offset, *(b for b in bounds if region.offset < b < region.stop), region.stop]
        for start, stop in pairwise(inner):
            n_cols = min(r.n_cols for r in regions if r.offset <= start and stop <= r.stop)
            n_cols = n_cols if (stop - start) % n_cols == 0 else stop - start
            yield _piece(update, region, Region(offset=start, n_rows=(stop - start) // n_cols, n_cols=n_cols))


def _piece(module_update: ModuleUpdate, region: Region, piece: Region) -> ModuleUpdate:
    if piece == region:
        return module_update
    update = module_update.update
    first, last = piece.offset - region.offset, piece.stop - region.offset
    if isinstance(update, Replacement):
        values = update.values.reshape(-1)[first:last].reshape(piece.n_rows, piece.n_cols)
        return replace(module_update, update=replace(update, values=values), region=piece)
    if not isinstance(update, LowRank) or piece.n_cols != region.n_cols or first % piece.n_cols:
        kind = _kind(module_update)
        raise UnmergeableAdapterError(f"updates of overlapping parts, and a {kind} update cannot be cut like that")
    rows = slice(first // piece.n_cols, last // piece.n_cols)
    return replace(module_update, update=update.rows(rows), region=piece)


def _kind(module_update: ModuleUpdate) -> str:
    return "experts" if isinstance(module_update.update, Experts) else module_update.update.kind


def _who(adapters: Sequence[Adapter], updates: Iterable[ModuleUpdate]) -> str:
    return " and ".join(dict.fromkeys(adapters[u.adapter_index].name for u in updates))
