"""Sizes of layers as modules compute with them, and updates that take theirs from the base."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lora_deploy.adapter import Adapter, Orientation, Shapeless
from lora_deploy.errors import UnmergeableAdapterError
from lora_deploy.tensors import Region
from lora_deploy.updates.interface import Update
from lora_deploy.validate.base import Base
from lora_deploy.validate.findings import Findings
from lora_deploy.validate.placement import Placed


def shaped(
    update: Shapeless,
    placed: Placed,
    region: Region,
    shape: tuple[int, ...],
    adapter: Adapter,
    base: Base,
    findings: Findings,
) -> Update:
    """Give an update the size of its layer; which side of the stored matrix is which is decided as ``fit`` does.

    Raises:
        UnmergeableAdapterError: It is none of this layer.
    """
    name, keys = placed.part.tensor, placed.module_update.keys
    if placed.part.rows is not None:
        raise UnmergeableAdapterError(
            f"a {update.kind} update cannot be cut where base stores its rows in several tensors"
        )
    if len(shape) != 2 and not (update.takes_kernels and len(shape) > 2):
        raise UnmergeableAdapterError(f"a {update.kind} update is one of a linear layer, base is {tuple(shape)}")
    stored = (region.n_rows, region.n_cols)
    is_stored = len(shape) != 2 or placed.module_update.orientation is Orientation.STORED
    possible = [stored] if is_stored else sides_of(name, region, adapter, base)
    sides = [side for side in possible if fits(update.known, side)]
    if not sides:
        raise UnmergeableAdapterError(
            f"a {update.kind} update of a layer (out, in) = {_told(update.known)}, base is {tuple(shape)}"
        )
    if len(sides) > 1 and len({*sides[0]}) > 1:
        message = f"the base has no model type: taken as (out, in) = {sides[0]}"
        findings.warn("assumed-layout", name, message, keys)
    if update.kernel_caveat and math.prod(shape[2:]) > 1:
        findings.warn("unlike-training", name, update.kernel_caveat, keys)
    return update.shaped(*sides[0])


def sides_of(name: str, region: Region, adapter: Adapter, base: Base) -> Iterator[tuple[int, int]]:
    """Yield what (out, in) a stored matrix may be, the likeliest first; one where the base's model type tells."""
    direct, turned = (region.n_rows, region.n_cols), (region.n_cols, region.n_rows)
    stores_in_out = base.stores_in_out(name)
    if stores_in_out is None:
        yield from (turned, direct) if adapter.config.get("fan_in_fan_out") is True else (direct, turned)
    else:
        yield turned if stores_in_out else direct


def fits(known: tuple[int | None, int | None], sides: tuple[int, int]) -> bool:
    """Whether sides agree with those that a file shows."""
    return all(wanted in {None, found} for wanted, found in zip(known, sides, strict=True))


def _told(known: tuple[int | None, int | None]) -> str:
    return f"({', '.join('?' if side is None else str(side) for side in known)})"
