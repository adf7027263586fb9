"""Lay an update out as the base stores its tensor, or say why it does not fit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from lora_deploy.adapter import Adapter, Experts, ModuleUpdate, Orientation
from lora_deploy.errors import UnmergeableAdapterError
from lora_deploy.tensors import DType, Region
from lora_deploy.updates.dora import Dora
from lora_deploy.updates.interface import Update
from lora_deploy.updates.low_rank import LowRank
from lora_deploy.updates.replacement import Replacement
from lora_deploy.updates.token_rows import TokenRows
from lora_deploy.validate.base import Base
from lora_deploy.validate.findings import Findings
from lora_deploy.validate.placement import Placed

if TYPE_CHECKING:
    from torch import Tensor

Complain = Callable[[str, str], None]


def fit(
    placed: Placed, shape: tuple[int, ...], dtype: DType | None, adapter: Adapter, base: Base, findings: Findings
) -> ModuleUpdate | None:
    """Fit an update to its tensor.

    ``shape`` is the tensor's after replacements, ``dtype`` its stored format (None: the adapter adds it).
    """
    module_update, part = placed.module_update, placed.part

    def complain(code: str, message: str) -> None:
        findings.error(code, part.tensor, message, module_update.keys)

    update = module_update.update
    assert not isinstance(update, Experts)  # noqa: S101 - placement made them one by one
    if dtype is not None and not dtype.is_floating and not _is_integer_copy(update):
        complain("packed-dtype", f"base stores {dtype.value}: quantised or integer weights cannot take an update")
        return None
    region = part.region or module_update.region or Region.whole(shape)
    if module_update.region is not None and (part.region or part.rows or region.stop != math.prod(shape)):
        complain("shape-mismatch", f"update covers {region.stop} elements, base is {tuple(shape)}")
        return None
    try:
        cut = update if part.rows is None else cut_rows(update, part.rows)
        laid_out = _lay_out(placed, cut, region, shape, adapter, base, findings, complain)
    except UnmergeableAdapterError as error:
        complain("unfit-kind", error.message)
        return None
    if laid_out is None:
        return None
    return replace(module_update, update=laid_out, target=part.tensor, region=region, orientation=Orientation.STORED)


def cut_rows(update: Update, rows: slice) -> Update:
    """Restrict an update to some of its rows.

    Raises:
        UnmergeableAdapterError: The kind is not defined row by row.
    """
    if isinstance(update, LowRank):
        return update.rows(rows)
    if isinstance(update, Replacement):
        values = update.values
        return replace(update, values=values.reshape(-1, values.shape[-1])[rows] if values.ndim > 1 else values[rows])
    raise UnmergeableAdapterError(f"a {update.kind} update cannot be cut where base stores its rows in several tensors")


def _lay_out(
    placed: Placed,
    update: Update,
    region: Region,
    shape: tuple[int, ...],
    adapter: Adapter,
    base: Base,
    findings: Findings,
    complain: Complain,
) -> Update | None:
    wanted = (region.n_rows, region.n_cols)
    if isinstance(update, TokenRows):
        return _token_rows(update, wanted, complain)
    name, keys = placed.part.tensor, placed.module_update.keys
    direct, turned = update.shape == wanted, update.shape == wanted[::-1] and len(shape) == 2
    stores_in_out = base.stores_in_out(name)
    if placed.module_update.orientation is Orientation.STORED:
        turned = False
    elif stores_in_out:
        direct = False
    elif direct and turned and stores_in_out is None:
        return _square_of_unknown_model(placed, update, adapter, findings)
    if not (direct or turned):
        complain(*_misfit(update, wanted, shape))
        return None
    if not direct and not stores_in_out:
        message = f"update is {update.shape}, base is {tuple(shape)}: only its transpose fits"
        findings.note("transposed-by-shape", name, message, keys)
    laid_out = update if direct else update.transposed()
    if isinstance(laid_out, Dora) and laid_out.magnitude.numel() != wanted[laid_out.axis == "columns"]:
        found, expected = laid_out.magnitude.numel(), wanted[laid_out.axis == "columns"]
        complain(
            "magnitude-mismatch", f"DoRA magnitude has {found} entries, expected one for each of {expected} outputs"
        )
        return None
    return laid_out


def _square_of_unknown_model(placed: Placed, update: Update, adapter: Adapter, findings: Findings) -> Update:
    """Decide a square matrix of a model without model type: a linear layer, unless the adapter says otherwise."""
    is_turned = adapter.config.get("fan_in_fan_out") is True
    layer = "(in, out), as fan_in_fan_out says" if is_turned else "(out, in), as linear layers are"
    message = f"square, and the base has no model type: taken as stored {layer}"
    findings.warn("assumed-layout", placed.part.tensor, message, placed.module_update.keys)
    return update.transposed() if is_turned else update


def _token_rows(update: TokenRows, wanted: tuple[int, int], complain: Complain) -> TokenRows | None:
    n_rows, n_cols = wanted
    if update.values.shape[1] != n_cols:
        complain("shape-mismatch", f"token rows have {update.values.shape[1]} columns, base has {n_cols}")
        return None
    outside = [index for index in update.indices if not 0 <= index < n_rows]
    if outside:
        complain("token-outside", f"token ids up to {max(outside)}, the embedding has {n_rows} rows")
        return None
    return replace(update, n_rows=n_rows)


def _misfit(update: Update, wanted: tuple[int, int], shape: tuple[int, ...]) -> tuple[str, str]:
    grouped = len(shape) > 2 and update.shape[0] == wanted[0] and update.shape[1] > wanted[1]
    if grouped and update.shape[1] % wanted[1] == 0:
        groups = update.shape[1] // wanted[1]
        return "grouped-convolution", f"base has {groups} groups: the update mixes all inputs, no kernel can hold that"
    found = wanted if len(shape) == 2 else shape
    return "shape-mismatch", f"update is {update.shape}, base is {tuple(found)}"


def _is_integer_copy(update: Update) -> bool:
    return isinstance(update, Replacement) and not update.values.is_floating_point()


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal in shape, dtype and values."""
    return one.dtype == other.dtype and one.shape == other.shape and bool((one == other).all())
