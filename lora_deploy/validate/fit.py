"""Lay an update out as the base stores its tensor, or say why it does not fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lora_deploy.adapter import Adapter, Experts, ModuleUpdate, OfWeight, Orientation, Shapeless
from lora_deploy.errors import UnmergeableAdapterError
from lora_deploy.tensors import DType, Region
from lora_deploy.updates.dora import Dora
from lora_deploy.updates.interface import Update
from lora_deploy.updates.replacement import Replacement
from lora_deploy.updates.token_rows import TokenRows
from lora_deploy.validate.base import Base
from lora_deploy.validate.findings import Findings
from lora_deploy.validate.of_weight import with_weight
from lora_deploy.validate.placement import Placed
from lora_deploy.validate.rows import cut_rows, in_base_order
from lora_deploy.validate.shapes import shaped

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
    region = part.region or module_update.region or Region.whole(shape)
    try:
        if isinstance(update, Shapeless):
            update = shaped(update, placed, region, shape, adapter, base, findings)
        elif isinstance(update, OfWeight):
            update = with_weight(update, region.n_rows, base)
    except UnmergeableAdapterError as error:
        complain("unfit-kind", error.message)
        return None
    if dtype is not None and not dtype.is_floating and not _is_integer_copy(update):
        complain("packed-dtype", f"base stores {dtype.value}: quantised or integer weights cannot take an update")
        return None
    if module_update.region is not None and (part.region or part.rows or region.stop != math.prod(shape)):
        complain("shape-mismatch", f"update covers {region.stop} elements, base is {tuple(shape)}")
        return None
    try:
        update = in_base_order(update, module_update.row_order, part.tensor, base)
        cut = update if part.rows is None else cut_rows(update, part.rows)
        laid_out = _lay_out(placed, cut, region, shape, adapter, base, findings, complain)
    except UnmergeableAdapterError as error:
        complain("unfit-kind", error.message)
        return None
    if laid_out is None:
        return None
    if adapter.scales_bias and isinstance(laid_out, Dora):
        _warn_of_bias(part.tensor, module_update.keys, base, findings)
    return replace(module_update, update=laid_out, target=part.tensor, region=region, orientation=Orientation.STORED)


def _warn_of_bias(name: str, keys: Sequence[str], base: Base, findings: Findings) -> None:
    bias = name.removesuffix("weight") + "bias"
    if bias in base.specs:
        message = "in training its bias was scaled by m / ‖V‖ as well; like the trainer's own merge, this one leaves it"
        findings.warn("bias-unscaled", name, message, keys)


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
    if isinstance(laid_out, Dora) and not _has_all_magnitudes(laid_out, wanted):
        found, expected = laid_out.magnitude.numel(), wanted[laid_out.axis == "columns"]
        complain(
            "magnitude-mismatch", f"DoRA magnitude has {found} entries, expected one for each of {expected} outputs"
        )
        return None
    return laid_out


def _has_all_magnitudes(update: Dora, wanted: tuple[int, int]) -> bool:
    n_lines = wanted[0] if update.axis == "rows" else wanted[1]
    return int(update.magnitude.numel()) * (update.n_joint if update.axis == "columns" else 1) == n_lines


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
