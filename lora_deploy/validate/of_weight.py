"""Updates of a bias that the weight beside it takes part in: the product is taken when the base is known."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_deploy.adapter import OfWeight
from lora_deploy.errors import UnmergeableAdapterError
from lora_deploy.names import AmbiguousNameError
from lora_deploy.rounding import torch_dtype
from lora_deploy.updates.interface import Update
from lora_deploy.validate.base import Base

_BLOCK_ROWS = 1024


def with_weight(update: OfWeight, n_out: int, base: Base) -> Update:
    """Multiply the base's weight (out, in) by the adapter's column (in,), in float64, and give the update.

    Raises:
        UnmergeableAdapterError: The base has no such weight, or one of other sides or that is no matrix.
    """
    if update.column is None:
        return update.make(torch.zeros(n_out, dtype=torch.float64)).weighted(update.times)
    name = _stored(update.weight, base)
    spec = base.specs[name]
    if spec.shape != (n_out, len(update.column)) or not spec.dtype.is_floating or base.stores_in_out(name):
        raise UnmergeableAdapterError(
            f"a {update.kind} update multiplies the weight by {len(update.column)} numbers for {n_out} outputs, "
            f"{name} is {spec.shape}"
        )
    return update.make(_product(name, update.column.to(torch.float64), base)).weighted(update.times)


def _product(name: str, column: Tensor, base: Base) -> Tensor:
    """Rows of the weight times the column, block by block."""
    spec = base.specs[name]
    n_rows, n_cols = spec.shape
    row_bytes = spec.n_bytes // n_rows
    products = []
    for start in range(0, n_rows, _BLOCK_ROWS):
        stored = base.read(name, start * row_bytes, min(start + _BLOCK_ROWS, n_rows) * row_bytes)
        rows = torch.frombuffer(stored, dtype=torch_dtype(spec.dtype)).reshape(-1, n_cols)
        products.append((rows.to(torch.float64) * column).sum(dim=1))
    return torch.cat(products)


def _stored(name: str, base: Base) -> str:
    try:
        parts = base.index.find(name)
    except AmbiguousNameError as error:
        raise UnmergeableAdapterError(f"{name}: {error}") from error
    if parts is None or len(parts) != 1 or parts[0].region is not None or parts[0].rows is not None:
        raise UnmergeableAdapterError(f"{name} is no whole tensor of the base, and the update of its bias needs it")
    return parts[0].tensor
