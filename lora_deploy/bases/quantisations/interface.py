"""What a quantisation says about a packed checkpoint: which plain tensors it holds, and how to compute their rows.

Promise: nothing is computed before rows are asked for, and then only those; values are the real numbers that the
packing stands for, in float64, before any rounding to the format that the base computes in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, TypeAlias

import torch
from torch import Tensor

from lora_deploy.checkpoint import Checkpoint
from lora_deploy.errors import InputError, MalformedCheckpointError
from lora_deploy.rounding import torch_dtype
from lora_deploy.tensors import DType

Rows: TypeAlias = Callable[[int, int], Tensor]
"""Gives rows ``start:stop`` of a tensor seen as (product of the leading axes, last axis), float64."""

_F64_BIAS = 1023
_F64_MANTISSA_BITS = 52


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedTensor:
    """One tensor of the plain model, as it lies packed in a checkpoint."""

    name: str
    shape: tuple[int, ...]
    keys: tuple[str, ...]
    """Stored tensors that it is made of, in no special order; the plain model has none of them."""
    prepare: Callable[[], Rows]
    """What the rows have in common is computed here, tensor by tensor, and let go with the result."""
    dtype: DType | None = None
    """Format that the packing says it computes in; None: the base's."""

    @property
    def n_rows(self) -> int:
        """Rows as ``prepare``'s result counts them."""
        return math.prod(self.shape[:-1])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Unpacking:
    """Everything packed in a checkpoint."""

    tensors: tuple[PackedTensor, ...]
    left_out: tuple[str, ...] = ()
    """Stored tensors that say how activations are quantised: the plain model has no use for them."""


class Unpack(Protocol):
    """Find what is packed in a checkpoint."""

    def __call__(self, checkpoint: Checkpoint, settings: Mapping[str, Any], /) -> Unpacking:
        """Read headers, settings and small tensors only.

        Raises:
            InputError: The quantisation has a variant that is not known here.
            MalformedCheckpointError: Tensors contradict each other or the settings.
        """
        ...


def mapped(checkpoint: Checkpoint, name: str) -> Tensor:
    """See a stored tensor through the file's mapping; nothing is copied.

    Raises:
        MalformedCheckpointError: There is none of this name.
    """
    spec = checkpoint.tensors.get(name)
    if spec is None:
        raise MalformedCheckpointError(f"{checkpoint.ref.name}: has no {name}, which the packing needs")
    dtype = torch_dtype(spec.dtype)
    if not spec.n_elements:
        return torch.empty(spec.shape, dtype=dtype)
    return torch.frombuffer(checkpoint.read(name), dtype=torch.uint8).view(dtype).reshape(spec.shape)


def two_to_the(exponents: Tensor) -> Tensor:
    """Raise 2 to integers between -1022 and 1023, exactly, in float64."""
    return ((exponents.long() + _F64_BIAS) << _F64_MANTISSA_BITS).view(torch.float64)


def expect_shape(name: str, tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Pass a tensor of this shape.

    Raises:
        MalformedCheckpointError: It has another one.
    """
    if tuple(tensor.shape) != tuple(shape):
        raise MalformedCheckpointError(f"{name}: found shape {tuple(tensor.shape)}, expected {tuple(shape)}")
    return tensor


def weight_schemes(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """List what the groups of a configuration say about their weights (compressed-tensors and its like)."""
    groups = settings.get("config_groups")
    found = [group for group in groups.values() if isinstance(group, Mapping)] if isinstance(groups, Mapping) else []
    return [group["weights"] for group in found if isinstance(group.get("weights"), Mapping)]


def not_known(checkpoint: Checkpoint, what: str) -> NoReturn:
    """Refuse a variant of a quantisation, by its name."""
    raise InputError(
        f"base {checkpoint.ref.name}: cannot be dequantised: {what}",
        hint="use the 16-bit model it was made from",
        code="quantised-base",
    )
