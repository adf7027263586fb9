"""Apply a binding table: checkpoint tensors in, an initializer's values out.

Promise: memory is one initializer and one of its tensors. Elements are moved, cast and, for the norms that fold it, one
constant is added; a value that the wanted format cannot hold is an error. What is quantised is so by ``quantiser``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lora_deploy.errors import ExportError
from lora_deploy.export.binding_table import Kept, Origin, Quantised, Taken, shape_of
from lora_deploy.export.quantiser import quantised
from lora_deploy.rounding import torch_dtype
from lora_deploy.tensors import DType


def materialise(origin: Origin, dtype: torch.dtype, tensors: Iterator[Tensor]) -> Tensor:
    """Make an initializer's values.

    ``tensors`` gives the checkpoint tensors in the order of ``taken_tensors``; what is neither moved nor cast is given
    as it came, not copied.

    Raises:
        ExportError: A finite value becomes infinite in ``dtype``.
    """
    if isinstance(origin, Taken):
        return _laid(origin, dtype, next(tensors))
    if isinstance(origin, Kept):
        raise ExportError("a constant of the graph comes from no tensor")
    if isinstance(origin, Quantised):
        return quantised(materialise(origin.weight, torch_dtype(DType(origin.dtype)), tensors), origin.by)
    joined = torch.empty(shape_of(origin), dtype=dtype)
    start = 0
    for part in origin.parts:
        values = materialise(part, dtype, tensors)
        if origin.is_stack:
            joined.select(origin.axis, start).copy_(values)
            start += 1
        else:
            length = values.shape[origin.axis]
            joined.narrow(origin.axis, start, length).copy_(values)
            start += length
    return joined


def _laid(taken: Taken, dtype: torch.dtype, tensor: Tensor) -> Tensor:
    if math.prod(tensor.shape) != math.prod(taken.shape):
        raise ExportError(
            f"{taken.tensor}: found shape {tuple(tensor.shape)}, the graph was made for {taken.shape}", code="shape"
        )
    cast = tensor.to(dtype)
    if dtype.is_floating_point and dtype.itemsize < tensor.dtype.itemsize and not _keeps_numbers(tensor, cast):
        raise ExportError(f"{taken.tensor}: holds values that {str(dtype).removeprefix('torch.')} cannot")
    if taken.permutation is not None:
        cast = cast.permute(taken.permutation)
    if taken.plus:
        cast = cast + taken.plus
    return cast.reshape(taken.shape)


def _keeps_numbers(before: Tensor, after: Tensor) -> bool:
    return not before.numel() or bool((after.isfinite() | ~before.isfinite()).all())
