"""One adapted module of a file: its own tensors by slot, and those that all modules share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from lora_deploy.adapter import Experts, ModuleUpdate, OfWeight, Orientation, Shapeless
from lora_deploy.adapters.factors import check_finite, factor
from lora_deploy.adapters.interface import AdapterFile
from lora_deploy.errors import MalformedAdapterError
from lora_deploy.updates.interface import Update

_INTEGERS = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapted:
    """Tensors of one module, by what its format calls them."""

    file: AdapterFile
    path: str
    """Of the module in the base model."""
    slots: Mapping[str, str]
    """The format's name of a tensor, such as ``vera_lambda_b``, to its key."""
    shared: Mapping[str, str]
    """The same for tensors that belong to no module."""
    components: tuple[str, ...] = ()
    """Components of a pipeline that the module may be in."""

    def factor(self, slot: str, *shape: int | None) -> Tensor:
        """Give a trained tensor; ``shape`` is what it must have, None any size.

        Raises:
            MalformedAdapterError: Another shape, empty, or no floating-point numbers.
            NonFiniteTensorError: A NaN or an infinity.
        """
        return self._checked(factor(self.file, self._key(slot), n_dims=(len(shape),)), slot, shape)

    def any_factor(self, slot: str, *, n_least: int = 2) -> Tensor:
        """Give a trained tensor of any shape with no fewer sides than ``n_least``; raises as ``factor``."""
        found = factor(self.file, self._key(slot))
        if found.ndim < n_least:
            raise self.malformed(f"{slot} has shape {tuple(found.shape)}, expected at least {n_least} sides")
        return found

    def sides(self, slot: str) -> tuple[None, ...]:
        """As many sides, each of any size, as a tensor has."""
        return (None,) * self.file.tensors[self._key(slot)].ndim

    def number(self, slot: str) -> Fraction | None:
        """Give a tensor of one element, whole or floating-point, exactly; None where the module has none.

        Raises:
            MalformedAdapterError: It has more elements, or none.
            NonFiniteTensorError: A NaN or an infinity.
        """
        key = self.slots.get(slot)
        if key is None:
            return None
        stored = self.file.tensors[key]
        if stored.numel() != 1 or stored.is_complex():
            raise self.malformed(f"{slot} has shape {tuple(stored.shape)}, expected one number")
        check_finite(self.file, key)
        return Fraction(stored.item())

    def integers(self, slot: str, *shape: int | None, below: int) -> Tensor:
        """Give indices as int64, each within ``0 <= i < below``; whole floating-point numbers are taken, too.

        Raises:
            MalformedAdapterError: Another shape, no integers, or out of bounds.
        """
        key = self._key(slot)
        stored = self.file.tensors[key]
        found = self._checked(stored, slot, shape)
        indices = found.to(torch.int64)
        if found.dtype not in _INTEGERS and not torch.equal(indices.to(found.dtype), found):
            raise self.malformed(f"{key} holds no integers")
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < below:
            raise self.malformed(f"{key} holds {int(indices.min())} to {int(indices.max())}, expected 0 to {below - 1}")
        return indices

    def malformed(self, problem: str) -> MalformedAdapterError:
        """Make the error that names file and module."""
        return MalformedAdapterError(f"{self.file.path}: {self.path}: {problem}")

    def update(
        self,
        update: Update | Experts | Shapeless | OfWeight,
        *,
        keys: Sequence[str] | None = None,
        orientation: Orientation = Orientation.UNKNOWN,
        parameter: str = "weight",
        method: str = "",
    ) -> ModuleUpdate:
        """Aim an update at one of the module's parameters.

        ``keys`` are those that it was read from, by default all of the module's own.
        """
        return ModuleUpdate(
            target=f"{self.path}.{parameter}",
            components=self.components,
            method=method,
            update=update,
            orientation=orientation,
            keys=tuple(self.slots.values() if keys is None else keys),
        )

    def _key(self, slot: str) -> str:
        key = self.slots.get(slot) or self.shared.get(slot)
        if key is None:
            raise self.malformed(f"has {', '.join(self.slots)} but no {slot}")
        return key

    def _checked(self, tensor: Tensor, slot: str, shape: Sequence[int | None]) -> Tensor:
        is_fit = len(shape) == tensor.ndim and all(
            wanted in {None, found} for wanted, found in zip(shape, tensor.shape, strict=True)
        )
        if not is_fit:
            told = ", ".join("?" if side is None else str(side) for side in shape)
            raise self.malformed(f"{slot} has shape {tuple(tensor.shape)}, expected ({told})")
        return tensor
