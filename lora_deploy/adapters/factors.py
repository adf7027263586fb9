"""Factors as they lie in a file, checked, and the low-rank updates they make.

Promise: a factor is a non-empty, finite floating-point tensor, or the error names it; a pair that makes an update fits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lora_deploy.adapters.interface import AdapterFile
from lora_deploy.errors import MalformedAdapterError, NonFiniteTensorError, UnmergeableAdapterError
from lora_deploy.updates.interface import Scale
from lora_deploy.updates.low_rank import LowRank

_FLOATING = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})


def factor(file: AdapterFile, key: str, *, n_dims: Sequence[int] = ()) -> Tensor:
    """Give a factor by its key; ``n_dims`` are the numbers of axes it may have, empty means any.

    Raises:
        MalformedAdapterError: Empty, not floating-point, or another number of axes.
        NonFiniteTensorError: It holds a NaN or an infinity.
    """
    tensor = file.tensors[key]
    if tensor.layout != torch.strided or tensor.dtype not in _FLOATING:
        raise MalformedAdapterError(
            f"{file.path}: {key}: found {_kind(tensor)}, expected dense float64, float32, float16 or bfloat16"
        )
    if not tensor.numel():
        raise MalformedAdapterError(
            f"{file.path}: {key}: is empty, shape {tuple(tensor.shape)}: a share under DeepSpeed ZeRO-3 or FSDP",
            hint="gather the parameters before saving the adapter",
        )
    if n_dims and tensor.ndim not in n_dims:
        expected = " or ".join(map(str, n_dims))
        raise MalformedAdapterError(f"{file.path}: {key}: found shape {tuple(tensor.shape)}, expected {expected} axes")
    check_finite(file, key)
    return tensor


def check_finite(file: AdapterFile, key: str) -> None:
    """Check that a tensor holds neither NaN nor infinity.

    Raises:
        NonFiniteTensorError: It does.
    """
    tensor = file.tensors[key]
    if not tensor.is_floating_point():
        return
    flawed = int((~torch.isfinite(tensor.float() if tensor.itemsize == 1 else tensor)).sum())
    if flawed:
        raise NonFiniteTensorError(
            f"{file.path}: {key}: {flawed} of {tensor.numel()} values are NaN or infinite",
            hint="training diverged or the file is damaged; take an earlier checkpoint",
        )


def low_rank(file: AdapterFile, module: str, down: Tensor, up: Tensor, scale: Scale) -> LowRank:
    """Make the update of a linear layer or of a convolution from ``down`` (r, in, *k) and ``up`` (out, r, *1).

    A convolution is flattened behind its input axis, as its weight is.

    Raises:
        MalformedAdapterError: The shapes do not fit each other.
        UnmergeableAdapterError: A grouped convolution.
    """
    shapes = f"A is {tuple(down.shape)}, B is {tuple(up.shape)}"
    if down.ndim < 2 or down.ndim != up.ndim or math.prod(up.shape[2:]) != 1:
        raise MalformedAdapterError(f"{file.path}: {module}: {shapes}: expected (r, in, *k) and (out, r, *1)")
    if up.ndim > 2 and up.shape[1] != down.shape[0] and down.shape[0] % up.shape[1] == 0:
        raise UnmergeableAdapterError(
            f"{file.path}: {module}: {shapes}: PEFT's update of a grouped convolution is dense across groups, "
            "which the grouped weight cannot hold"
        )
    if up.shape[1] != down.shape[0]:
        raise MalformedAdapterError(f"{file.path}: {module}: {shapes}: the ranks differ")
    return LowRank(down=down.flatten(1), up=up.flatten(1), scale=scale)


def is_zero(update: LowRank) -> bool:
    """Whether one factor is all zero: what an untrained module looks like."""
    return not torch.count_nonzero(update.up) or not torch.count_nonzero(update.down)


def _kind(tensor: Tensor) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return dtype if tensor.layout == torch.strided else f"{tensor.layout} {dtype}".removeprefix("torch.")
