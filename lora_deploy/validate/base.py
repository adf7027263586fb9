"""A base as its adapters see it: layers replicated as they were in training, names of all dialects, shared tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from lora_deploy.checkpoint import Checkpoint
from lora_deploy.names import NameIndex, Tie, ties_of
from lora_deploy.names.dialects import CONV1D_MODULES, CONV1D_TYPES, model_types
from lora_deploy.tensors import TensorSpec

_COMPARED_BYTES = 1 << 24


class Base:
    """A checkpoint behind the names and the layer stack that adapters use."""

    def __init__(self, checkpoint: Checkpoint, stack: Mapping[str, str] | None = None) -> None:
        """See ``checkpoint`` through ``stack``: tensor names of the merged model to those they are copied from."""
        self.checkpoint = checkpoint
        self.stack = stack or {name: name for name in checkpoint.tensors}
        self.specs: dict[str, TensorSpec] = {
            name: replace(checkpoint.tensors[source], name=name) for name, source in self.stack.items()
        }
        self.config = checkpoint.config
        self.model_types = tuple(model_types(self.config))
        self.index = NameIndex(self.specs, self.config)
        self.ties = ties_of(self.index, self.specs, self.config)
        self._shared: dict[str, bool] = {}
        self._members = {self.index.canonical(tie.member): tie for tie in self.ties if not tie.is_stored}

    def spec(self, name: str) -> TensorSpec | None:
        """Give the tensor that an output of this name starts from, or None when the base has nothing for it."""
        if name in self.specs:
            return self.specs[name]
        tie = self._members.get(self.index.canonical(name))
        return self.specs[tie.source] if tie and tie.member == name else None

    def absent_member(self, name: str) -> Tie | None:
        """Give the tie by which the model has a tensor of this name though the file has none."""
        return self._members.get(self.index.canonical(name))

    def stores_in_out(self, name: str) -> bool | None:
        """Whether the tensor belongs to a layer that stores (in, out); None when no model type says."""
        if not self.model_types:
            known = self.checkpoint.is_out_in or "_class_name" in self.config  # diffusers has no such layers
            return False if known else None
        return not CONV1D_TYPES.isdisjoint(self.model_types) and CONV1D_MODULES.search(name) is not None

    def is_shared(self, tie: Tie) -> bool:
        """Whether member and source really are one matrix: the member absent from the file, or an equal copy."""
        if tie.member not in self._shared:
            self._shared[tie.member] = not tie.is_stored or self._has_same_bytes(tie.source, tie.member)
        return self._shared[tie.member]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> memoryview:
        """Map bytes of the tensor that an output starts from."""
        return self.checkpoint.read(self.stack[name], start, stop)

    def _has_same_bytes(self, one: str, other: str) -> bool:
        first, second = self.specs[one], self.specs[other]
        if (first.dtype, first.shape) != (second.dtype, second.shape):
            return False
        for start in range(0, first.n_bytes, _COMPARED_BYTES):
            stop = min(start + _COMPARED_BYTES, first.n_bytes)
            left, right = (np.frombuffer(self.read(name, start, stop), np.uint8) for name in (one, other))
            if not np.array_equal(left, right):
                return False
        return True
