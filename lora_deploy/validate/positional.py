"""Give updates that are numbered the names of the layers that come in this order, if exactly one known order fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lora_deploy.adapter import Adapter, Experts, ModuleUpdate, OfWeight, Shapeless
from lora_deploy.names.orders import orders_of
from lora_deploy.validate.base import Base
from lora_deploy.validate.findings import Findings


def named_by_position(
    adapter: Adapter, updates: Sequence[ModuleUpdate], base: Base, findings: Findings
) -> list[ModuleUpdate]:
    """Give the updates names of the base's tensors; none of them, and a finding, where no one order fits."""
    orders = orders_of(base.specs)
    fitting = [order for order in orders if _fits(order, updates, base)]
    if len(fitting) == 1:
        return [replace(update, target=name) for update, name in zip(updates, fitting[0], strict=True)]
    keys = [key for update in updates[:1] for key in update.keys]
    if len(fitting) > 1:
        message = f"{len(fitting)} orders of layers fit its {len(updates)} modules by their shapes"
        findings.error("ambiguous-order", adapter.name, message, keys)
    elif not orders:
        message = "its modules are numbered, and the order of this model's layers is not known here"
        findings.error("order-unknown", adapter.name, message, keys)
    else:
        findings.error("order-mismatch", adapter.name, _first_misfit(orders, updates, base), keys)
    return []


def _shape(update: ModuleUpdate) -> tuple[int, int]:
    assert not isinstance(update.update, Experts | Shapeless | OfWeight)  # noqa: S101 - positional formats have none
    return update.update.shape


def _stored(name: str, base: Base) -> tuple[int, int]:
    region = base.specs[name].region
    return region.n_rows, region.n_cols


def _fits(order: Sequence[str], updates: Sequence[ModuleUpdate], base: Base) -> bool:
    return len(order) == len(updates) and all(
        _shape(update) == _stored(name, base) for update, name in zip(updates, order, strict=True)
    )


def _first_misfit(orders: Sequence[Sequence[str]], updates: Sequence[ModuleUpdate], base: Base) -> str:
    order = orders[0]
    if len(order) != len(updates):
        return f"{len(updates)} modules for {len(order)} attention and feed-forward layers"
    k, name = next((k, name) for k, name in enumerate(order) if _shape(updates[k]) != _stored(name, base))
    return f"module {k} is {_shape(updates[k])}, {name} is {_stored(name, base)}; no other known order fits either"
