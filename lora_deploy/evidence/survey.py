"""Look at a stored tensor that failed: which elements hold the merged value, which the base's, which neither.

Hypotheses (another scale, another orientation, another module's update) are compared by what they would have stored:
the exact values under each, rounded, element for element. Comparing what is stored works where the step of the format
is larger than the delta, too; there, a fitted line would not: small deltas round to none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from lora_deploy.adapter import ModuleUpdate
from lora_deploy.checkpoint import Checkpoint
from lora_deploy.evidence.definition import Block, blocks, stored_block
from lora_deploy.merge.plan import PlannedTensor
from lora_deploy.rounding import BITS, round_once, torch_dtype
from lora_deploy.tensors import DType, TensorSpec

_COARSE_DELTA = 2.0**-7
"""How far a delta may be off that was rounded twice to bfloat16, relative to itself."""
_FLOAT32_STEPS = 16
"""How far products in float32 may be apart, in steps of the sum."""
_SAMPLE_ELEMENTS = 1 << 18
_NEARLY_ALL = 0.999
_CLEARLY_BETTER = 0.5


@dataclass(slots=True, kw_only=True)
class Survey:
    """Counts over all elements of a tensor."""

    n_elements: int = 0
    n_not_finite: int = 0
    n_merged: int = 0
    """Elements near the merged value and not at the base's, where the two can be told apart."""
    n_base: int = 0
    """Elements at the base's value where the merged one is another."""
    n_other: int = 0
    """Elements near neither."""
    n_turns: int = 0
    """How often base and merged elements take turns, in order."""
    first_other: int | None = None
    first_base: int | None = None
    last_base: int | None = None
    """Flat positions."""

    def add(self, block: Block, stored: Tensor, grain: DType) -> None:
        """Count the elements of a block."""
        merged = block.base + block.delta
        base = rounded(block.base, grain)
        at_base, is_told = stored == base, base != rounded(merged, grain)
        is_near = (stored - merged).abs() <= tolerance(merged, block.delta, grain)
        is_base = (at_base & is_told).view(-1)
        is_merged = (is_near & ~at_base & is_told).view(-1)
        is_other = (~is_near & ~at_base).view(-1)
        self.n_elements += stored.numel()
        self.n_not_finite += int((~stored.isfinite()).sum())
        self.n_merged += int(is_merged.sum())
        self.n_base += int(is_base.sum())
        self.n_other += int(is_other.sum())
        self.n_turns += int(is_base[is_base | is_merged].to(torch.int8).diff().abs().sum())
        self.first_other = _first(self.first_other, is_other, block.start)
        self.first_base = _first(self.first_base, is_base, block.start)
        if bool(is_base.any()):
            self.last_base = block.start + int(is_base.nonzero()[-1])


def _first(before: int | None, found: Tensor, start: int) -> int | None:
    return start + int(found.nonzero()[0]) if before is None and bool(found.any()) else before


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """A stored tensor with the planned one that it is taken for."""

    tensor: PlannedTensor
    stored: TensorSpec
    base: Checkpoint
    merged: Checkpoint

    def with_updates(self, updates: Sequence[ModuleUpdate]) -> PlannedTensor:
        """Plan the same tensor with other updates: a hypothesis."""
        return replace(self.tensor, updates=tuple(updates))

    def pairs(self, tensor: PlannedTensor) -> Iterator[tuple[Block, Tensor]]:
        """Give every block of a hypothesis with the stored values in its place, float64, in its shape."""
        for block in blocks(tensor, self.base):
            yield block, stored_block(self.merged, self.stored, block).to(torch.float64)

    @cached_property
    def grain(self) -> DType:
        """The coarsest format that holds all stored values: what the tensor was in before it was stored."""
        candidates = [self.stored.dtype, DType.F16, DType.BF16]
        for _, stored in self.pairs(self.with_updates(())):
            candidates = [d for d in candidates if torch.equal(stored.to(torch_dtype(d)).to(torch.float64), stored)]
        return candidates[-1] if candidates else self.stored.dtype

    @cached_property
    def survey(self) -> Survey:
        """What the elements hold."""
        found = Survey()
        for block, stored in self.pairs(self.tensor):
            found.add(block, stored, self.grain)
        return found

    def sample(self, tensor: PlannedTensor) -> tuple[Block, Tensor]:
        """The first block that a hypothesis changes, with what is stored there."""
        found = blocks(tensor, self.base, _SAMPLE_ELEMENTS)
        block = next((block for block in found if block.deltas), None) or next(blocks(tensor, self.base))
        return block, stored_block(self.merged, self.stored, block).to(torch.float64)

    @cached_property
    def error_of_plan(self) -> float:
        """The part of the sample that neither the plan nor the bare base would have stored so: the smaller of both."""
        block, stored = self.sample(self.tensor)
        return min(self.error(block.base + block.delta, stored), self.error(block.base, stored))

    def error(self, values: Tensor, stored: Tensor) -> float:
        """The part of stored values that exact values, rounded, would not have given, [0..1]."""
        expected = rounded(values, self.grain)
        if self.grain in {DType.BF16, DType.F16}:
            return float((stored != expected).double().mean())
        return float(((stored - expected).abs() > _FLOAT32_STEPS * step(values, self.grain)).double().mean())

    def error_of(self, hypothesis: PlannedTensor) -> float:
        """The part of its sample that a hypothesis would not have stored, [0..1]."""
        block, stored = self.sample(hypothesis)
        return self.error(block.base + block.delta, stored)

    def accepts(self, hypothesis: PlannedTensor) -> bool:
        """Whether a hypothesis accounts for nearly all elements, and clearly better than the plan does."""
        if self.error_of(hypothesis) >= _CLEARLY_BETTER * self.error_of_plan:
            return False
        n_near = n_elements = 0
        for block, stored in self.pairs(hypothesis):
            values = block.base + block.delta
            n_near += int(((stored - values).abs() <= tolerance(values, block.delta, self.grain)).sum())
            n_elements += stored.numel()
        return n_near >= _NEARLY_ALL * n_elements


def tolerance(values: Tensor, delta: Tensor, grain: DType) -> Tensor:
    """How far a value may be from the exact one after every rounding that peers do: one step, and the delta's own."""
    return step(values, grain) + _COARSE_DELTA * delta.abs()


def step(values: Tensor, dtype: DType) -> Tensor:
    """Distance from each value's size to the next larger one of a format, float64."""
    size = rounded(values, dtype).abs().to(torch_dtype(dtype))
    above = (size.view(BITS[dtype]) + 1).view(size.dtype)
    return (above.to(torch.float64) - size.to(torch.float64)).nan_to_num(posinf=torch.inf)


def rounded(values: Tensor, dtype: DType) -> Tensor:
    """Round float64 values to a format, as float64."""
    return round_once(values, dtype).to(torch.float64)
