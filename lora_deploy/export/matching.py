"""Find by content which checkpoint tensors an initializer was made from.

This works because the checkpoint is a synthetic one in which no two tensors, rows or columns are alike. Promise: what
is found reproduces every byte; what is not found is said, never guessed. Whatever else a coincidence might allow is
ruled out by the caller, who applies the result to a second checkpoint with other values.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import permutations

import torch
from torch import Tensor

from lora_deploy.export.binding_table import Joined, Origin, Taken
from lora_deploy.merge.shard import bytes_of

_MAX_PERMUTED_AXES = 3
_CONVOLUTIONS = ((0, 2, 3, 1), (1, 0, 2, 3), (2, 3, 1, 0), (3, 2, 0, 1))
"""Orders of four axes that libraries store convolutions in."""


class Matcher:
    """Looks initializers up among a checkpoint's tensors."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """Index nothing yet: each number format and size is indexed when it is first asked for."""
        self._tensors = tensors
        self._by_size: dict[int, list[str]] = defaultdict(list)
        for name, tensor in tensors.items():
            self._by_size[tensor.numel()].append(name)
        self._wholes: dict[tuple[torch.dtype, int], dict[bytes, Taken]] = {}
        self._lines: dict[torch.dtype, dict[bytes, list[Taken]]] = {}

    def explain(self, values: Tensor) -> Origin | None:
        """Find where values come from; None if nothing in the checkpoint explains every one of them."""
        whole = self._whole(values)
        if whole is not None or values.dim() == 0:
            return whole
        if values.dim() == 1:
            return self._joined_vectors(values)
        if values.dim() == 2:
            return self._joined_rows(values) or _turned(self._joined_rows(values.T))
        parts = []
        for part in values:
            origin = self.explain(part)
            if origin is None:
                return None
            parts.append(origin)
        return Joined(axis=0, is_stack=True, parts=tuple(parts)) if parts else None

    def _whole(self, values: Tensor) -> Taken | None:
        key = (values.dtype, values.numel())
        if key not in self._wholes:
            self._wholes[key] = dict(self._index(*key))
        found = self._wholes[key].get(_digest(values))
        return found and found.model_copy(update={"shape": tuple(values.shape)})

    def _index(self, dtype: torch.dtype, size: int) -> Iterator[tuple[bytes, Taken]]:
        for name in self._by_size.get(size, ()):
            tensor = self._tensors[name]
            if not _is_castable(tensor.dtype, dtype):
                continue
            cast = tensor.to(dtype)
            if dtype.is_floating_point and tensor.dim() <= 1:
                yield _digest(cast + 1.0), Taken(tensor=name, plus=1.0, shape=tuple(tensor.shape))
            for order in reversed(_layouts(tensor)):  # as stored comes last and wins where layouts coincide
                laid = cast if order is None else cast.permute(order)
                yield _digest(laid), Taken(tensor=name, permutation=order, shape=tuple(laid.shape))

    def _joined_vectors(self, values: Tensor) -> Origin | None:
        parts: list[Taken] = []
        start = 0
        while start < len(values):
            found = next(
                (
                    Taken(tensor=name, shape=tuple(tensor.shape))
                    for name, tensor in self._tensors.items()
                    if tensor.dim() == 1
                    and 0 < len(tensor) <= len(values) - start
                    and _is_castable(tensor.dtype, values.dtype)
                    and torch.equal(tensor.to(values.dtype), values[start : start + len(tensor)])
                ),
                None,
            )
            if found is None:
                return None
            parts.append(found)
            start += found.shape[0]
        return Joined(axis=0, parts=tuple(parts)) if len(parts) > 1 else None

    def _joined_rows(self, values: Tensor) -> Joined | None:
        """Explain a matrix as matrices one below the other, each found by its first row."""
        lines = self._first_lines(values.dtype)
        parts: list[Taken] = []
        start = 0
        while start < len(values):
            found = next(
                (
                    taken
                    for taken in lines.get(_digest(values[start]), ())
                    if start + taken.shape[0] <= len(values)
                    and _digest(values[start : start + taken.shape[0]]) == _digest(self._laid(taken, values.dtype))
                ),
                None,
            )
            if found is None:
                return None
            parts.append(found)
            start += found.shape[0]
        return Joined(axis=0, parts=tuple(parts)) if len(parts) > 1 else None

    def _first_lines(self, dtype: torch.dtype) -> dict[bytes, list[Taken]]:
        if dtype not in self._lines:
            lines: dict[bytes, list[Taken]] = defaultdict(list)
            for name, tensor in self._tensors.items():
                if tensor.dim() == 2 and tensor.numel() and _is_castable(tensor.dtype, dtype):
                    upright = Taken(tensor=name, shape=tuple(tensor.shape))
                    turned = Taken(tensor=name, permutation=(1, 0), shape=tuple(tensor.T.shape))
                    lines[_digest(tensor[0].to(dtype))].append(upright)
                    lines[_digest(tensor[:, 0].to(dtype))].append(turned)
            self._lines[dtype] = lines
        return self._lines[dtype]

    def _laid(self, taken: Taken, dtype: torch.dtype) -> Tensor:
        tensor = self._tensors[taken.tensor].to(dtype)
        return tensor if taken.permutation is None else tensor.permute(taken.permutation)


def _turned(origin: Joined | None) -> Joined | None:
    """The origin of the transposed matrix: side by side instead of one below the other."""
    if origin is None:
        return None
    parts = []
    for part in origin.parts:
        assert isinstance(part, Taken)  # noqa: S101 - rows are joined of whole tensors only
        order = (1, 0) if part.permutation is None else None
        parts.append(part.model_copy(update={"permutation": order, "shape": part.shape[::-1]}))
    return Joined(axis=1, parts=tuple(parts))


def _layouts(tensor: Tensor) -> list[tuple[int, ...] | None]:
    if tensor.dim() < 2:
        return [None]
    if tensor.dim() <= _MAX_PERMUTED_AXES:
        return [None, *list(permutations(range(tensor.dim())))[1:]]
    return [None, *_CONVOLUTIONS] if tensor.dim() == 4 else [None]


def _is_castable(stored: torch.dtype, wanted: torch.dtype) -> bool:
    """Whether every stored value has its own in the wanted format: the same, or a wider floating one."""
    if stored == wanted:
        return True
    both_float = stored.is_floating_point and wanted.is_floating_point
    return both_float and wanted.itemsize > stored.itemsize


def _digest(values: Tensor) -> bytes:
    return hashlib.blake2b(bytes_of(values), digest_size=16).digest()
