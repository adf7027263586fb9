"""When the compiled pass over memory (``kernel``) is worth it, and the way to it from tensors and back.

Promise: with it or without it the bytes are the same; a block that it cannot take, ``exact`` computes as ever.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_deploy.merge.factors import Factors
from lora_deploy.merge.plan import MergePlan
from lora_deploy.rounding import dtype_of
from lora_deploy.tensors import DType

PAYS_FROM_ELEMENTS = 200_000_000
"""Merged elements from which on it saves more than it takes to load, and to compile the first time."""
COMPILED_BYTES = 130_000_000
"""Private memory of the compiler and of what it made."""

_MOST = 2.0**40
"""Largest factor that float32 products and their errors are bounded for."""
_MOST_OPEN = 1 << 8
"""One element in so many may stay open; where more do, float64 decides faster."""
_STORED_AS = {DType.F16: 0, DType.BF16: 1, DType.F32: 2}
_BITS = {DType.F16: torch.uint16, DType.BF16: torch.uint16, DType.F32: torch.uint32}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OnePass:
    """What the kernel found while it wrote a block."""

    positions: Tensor
    """(n,) int64: flat positions of what is still open."""
    values: Tensor
    """(n,) float64: their values."""
    error_square: float
    """Σ (stored - exact)²."""
    weight_square: float
    """Σ W²."""
    max_bits: int
    """Largest size of what is settled, as bits of the output dtype."""
    n_underflowed: int
    """Settled elements that were not zero and are stored as zero."""


def pays(plan: MergePlan) -> bool:
    """Whether the compiled pass is installed and the plan large enough for it."""
    n_elements = sum(tensor.spec.n_elements for tensor in plan.tensors if tensor.updates)
    return n_elements >= PAYS_FROM_ELEMENTS and importlib.util.find_spec("numba") is not None


def merge_in_one_pass(weights: Tensor, merged: Tensor, factors: Factors, rows: slice) -> OnePass | None:
    """Write the rounded block to ``merged``, but for what stays open; None when the kernel cannot take it.

    Shapes: weights and merged (n, n_cols), of the CPU; ``rows`` are the block's rows of the region.
    """
    stored, result = dtype_of(weights), dtype_of(merged)
    if not _takes(stored, result, factors) or not weights.is_contiguous():
        return None
    from lora_deploy.merge import kernel

    single = factors.single
    most_open = merged.numel() // _MOST_OPEN + 256
    positions, values = torch.empty(most_open, dtype=torch.int64), torch.empty(most_open, dtype=torch.float64)
    n_open, error_square, weight_square, max_bits, n_underflowed = kernel.merge_block(
        weights.view(_BITS[stored]).view(-1).numpy(),
        _STORED_AS[stored],
        merged.view(torch.uint16).view(-1).numpy(),
        _STORED_AS[result],
        single.left[rows],
        single.right,
        single.row_errors[rows],
        single.col_norms,
        single.wide_left[rows],
        single.wide_columns,
        factors.unit,
        positions.numpy(),
        values.numpy(),
    )
    if n_open > most_open or not math.isfinite(error_square + weight_square):
        return None
    return OnePass(
        positions=positions[:n_open],
        values=values[:n_open],
        error_square=error_square,
        weight_square=weight_square,
        max_bits=max_bits,
        n_underflowed=n_underflowed,
    )


def _takes(stored: DType, result: DType, factors: Factors) -> bool:
    is_ordinary = stored in _STORED_AS and result in {DType.F16, DType.BF16}
    return is_ordinary and factors.is_plain and factors.largest <= _MOST
