"""Scales that several elements share: one for a tensor, a channel, a group of inputs, or a block of rows by columns."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lora_deploy.bases.quantisations.interface import Rows, two_to_the
from lora_deploy.errors import MalformedCheckpointError

_UNIT_EXPONENT = 127
_NO_NUMBER = 255

Block = tuple[int, int]
"""Rows and columns of the last two axes that share a scale, as a configuration declares them."""


def spread(name: str, scale: Tensor, shape: tuple[int, ...], block: Block | None) -> Callable[[], Rows]:
    """Check a scale against the shape of its weight, and give what repeats it over the weight's rows, in float64.

    Raises:
        MalformedCheckpointError: It fits the shape in no way, or is no number.
    """
    grid = _with_axes(name, scale, shape)
    sizes = tuple(_sizes(name, tuple(grid.shape), shape, block))

    def prepare() -> Rows:
        wide, columns = _in_double(grid), torch.arange(shape[-1]) // sizes[-1]

        def rows(start: int, stop: int) -> Tensor:
            index, place = torch.arange(start, stop), []
            for n, size in zip(reversed(shape[:-1]), reversed(sizes[:-1]), strict=True):
                place.append(index % n // size)
                index = index // n
            return wide[tuple(reversed(place))][:, columns]

        return rows

    return prepare


def _with_axes(name: str, scale: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Give a scale as many axes as its weight has."""
    if scale.dtype is torch.uint8 and (scale == _NO_NUMBER).any():
        raise MalformedCheckpointError(f"{name}: a scale that is no number (E8M0 255)")
    if scale.dtype is not torch.uint8 and not scale.is_floating_point():
        raise MalformedCheckpointError(f"{name}: found {scale.dtype}, expected a floating scale")
    if scale.numel() == 1:
        return scale.reshape((1,) * len(shape))
    if scale.ndim == 1 and scale.numel() == shape[0]:
        return scale.reshape(-1, *(1,) * (len(shape) - 1))
    if scale.ndim != len(shape):
        raise MalformedCheckpointError(f"{name}: found shape {tuple(scale.shape)} for a weight of shape {shape}")
    return scale


def _in_double(scale: Tensor) -> Tensor:
    """Eight bits without a sign are an exponent alone (E8M0)."""
    return two_to_the(scale.int() - _UNIT_EXPONENT) if scale.dtype is torch.uint8 else scale.double()


def _sizes(name: str, grid: tuple[int, ...], shape: tuple[int, ...], block: Block | None) -> Iterator[int]:
    """Say how many elements share a scale along each axis: what is declared where it fits, else what divides evenly."""
    declared = (*(0,) * (len(shape) - 2), *(block or (0, 0)))
    for n_scales, n, size in zip(grid, shape, declared, strict=True):
        if n_scales == 1:
            yield max(n, 1)
        elif size and math.ceil(n / size) == n_scales:
            yield size
        elif n_scales and n % n_scales == 0:
            yield n // n_scales
        else:
            raise MalformedCheckpointError(f"{name}: found shape {grid} for a weight of shape {shape}, blocks {block}")
