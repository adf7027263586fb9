"""What values become when they are stored: rounded once, their range and their losses seen, numbers told from the rest.

Promise: a finite value never becomes infinite unnoticed; infinities and NaNs pass only where the base itself holds them
and nothing changes them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lora_deploy.errors import NonFiniteTensorError
from lora_deploy.merge.exact import BlockFacts
from lora_deploy.rounding import dtype_of, largest, round_once, torch_dtype
from lora_deploy.tensors import DType, Place


def store(values: Tensor, dtype: DType) -> Tensor:
    """Round to a format once; integers and values in that format already are given as they are."""
    if values.dtype == torch.float64 and dtype.is_floating:
        return round_once(values, dtype)
    return values.to(torch_dtype(dtype))  # from 32 bits or fewer, torch rounds once


def range_facts(exact: Tensor, stored: Tensor) -> BlockFacts:
    """Largest finite size and number of underflows of stored values, given what they were before."""
    facts = BlockFacts(n_elements=stored.numel())
    if not stored.numel() or not stored.dtype.is_floating_point:
        return facts
    least, most = (float(bound) for bound in torch.aminmax(stored.abs()))
    if not math.isfinite(most):  # NaN spreads into both
        finite = stored[stored.isfinite()].abs()
        least, most = 0.0, float(finite.max()) if finite.numel() else 0.0
    facts.max_abs = most
    if least == 0 and exact.dtype != stored.dtype:
        facts.n_underflowed = int(((stored == 0) & (exact != 0)).sum())
    return facts


def change_facts(before: Tensor, exact: Tensor, stored: Tensor) -> BlockFacts:
    """Everything about values that were changed in float64; ``before`` may be empty: then nothing was there."""
    facts = range_facts(exact, stored)
    facts.error_square = _square(stored.to(torch.float64) - exact)
    if before.numel():
        facts.weight_square, facts.delta_square = _square(before), _square(exact - before)
    return facts


def _square(values: Tensor) -> float:
    flat = values.reshape(-1)
    return float(torch.dot(flat, flat))


def has_only_numbers(stored: Tensor) -> bool:
    """Whether no infinity and no NaN is there."""
    return not stored.dtype.is_floating_point or not stored.numel() or math.isfinite(float(stored.abs().max()))


def refuse_overflow(place: Place, first_row: int, exact: Tensor, stored: Tensor) -> None:
    """Refuse finite values that became infinite; what was infinite before may stay so.

    Shapes: both (n, n_cols): rows of the region that ``place`` is of, from ``first_row`` on.

    Raises:
        NonFiniteTensorError: There is one.
    """
    for row, col in (exact.isfinite() & ~stored.isfinite()).nonzero()[:1].tolist():
        dtype = dtype_of(stored)
        raise NonFiniteTensorError(
            f"{place.element(first_row + row, col)} is {float(exact[row, col]):g}, "
            f"{dtype.long_name} holds at most {largest(dtype):g}",
            hint="--dtype base" if dtype is DType.F16 else None,
        )


def refuse_non_finite(place: Place, first_row: int, values: Tensor, whose: str) -> None:
    """Refuse values that are no numbers; ``whose`` they are is said. Shapes as ``refuse_overflow``.

    Raises:
        NonFiniteTensorError: There is one.
    """
    for row, col in (~values.isfinite()).nonzero()[:1].tolist():
        raise NonFiniteTensorError(
            f"{place.element(first_row + row, col)} of {whose} is {float(values[row, col])}, expected a finite number"
        )
