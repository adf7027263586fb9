"""Low-rank factors as the compiled pass takes them, with what bounds its float32 errors.

Promise: with n = ⌈R/4⌉, the float32 sum of n groups of four products misses Σ s·up·down by less than
``row_errors[i] * col_norms[j]``, whatever underflows or is fused; ``kernel`` says what the bound is made of.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

BLOCK_COLS = 256
"""Columns that are computed together: with sixteen rows of down factors, 24 KiB, which the first-level cache holds."""
N_TOGETHER = 4
"""Products that the kernel adds up before it adds their sum."""
_UNIT = 2.0**-24
"""Largest relative error of one float32 operation."""
_FLOOR = 2.0**-38
"""Least bound that is not zero: what underflows on the way is less than the product of two of them."""


class SingleFactors:
    """Factors in float32, and in float64 by columns."""

    def __init__(self, left: Tensor, right: Tensor) -> None:
        rank = left.shape[1]
        padding = N_TOGETHER if rank == 0 else -rank % N_TOGETHER
        left, right = (pad(matrix, (0, padding)) for matrix in (left, right.T))
        self.left: NDArray[np.float32] = left.to(torch.float32).numpy()
        """(n_rows, R'), R' the next multiple of four."""
        columns = pad(right, (0, 0, 0, -len(right) % BLOCK_COLS)).to(torch.float32).unflatten(0, (-1, BLOCK_COLS))
        self.right: NDArray[np.float32] = columns.transpose(1, 2).flatten(1).contiguous().numpy()
        """(n_blocks, R'·BLOCK_COLS): for each block of columns R' rows, the last block filled up with zeros."""
        self.wide_left: NDArray[np.float64] = left.numpy()
        """(n_rows, R')."""
        self.wide_columns: NDArray[np.float64] = right.contiguous().numpy()
        """(n_cols, R')."""
        relative = (self.left.shape[1] // N_TOGETHER + 6) * _UNIT
        self.row_errors = _raised(left.norm(dim=1) * relative)
        """(n_rows,)."""
        self.col_norms = _raised(right.norm(dim=1))
        """(n_cols,)."""


def _raised(bounds: Tensor) -> NDArray[np.float32]:
    """Round up to float32, to the floor at least; zero stays zero."""
    raised = torch.where(bounds > 0, bounds.clamp_min(_FLOOR) * (1 + 2.0**-20), 0.0)
    found: NDArray[np.float32] = raised.to(torch.float32).numpy()
    return found
