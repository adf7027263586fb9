"""What kind of folder a merge becomes: how the bytes of its files come about, and what lies beside them.

Promise: a form decides no value. Which tensors there are, in which format and with which updates, is the plan's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from lora_deploy.merge.exact import BlockFacts
from lora_deploy.merge.layout import index_files, json_text
from lora_deploy.merge.local import Workers
from lora_deploy.merge.plan import MergePlan, PlannedTensor, ShardPlan
from lora_deploy.merge.record import RecordedFile
from lora_deploy.merge.shard import chunks

Piece = tuple[memoryview, PlannedTensor | None, BlockFacts]
"""Bytes of a file, the tensor that was computed for them, if any, and what was seen of it."""


class Form(Protocol):
    """A kind of folder."""

    def contents(self, plan: MergePlan, shard: ShardPlan, workers: Workers, chunk_elements: int) -> Iterator[Piece]:
        """Give the bytes of a file after its header, in order."""
        ...

    def others(self, plan: MergePlan, written: tuple[RecordedFile, ...]) -> Mapping[str, bytes]:
        """Give files that speak of those that are written."""
        ...


class SafetensorsForm:
    """A checkpoint: every tensor in the plan's order, and an index for each model with several files."""

    def contents(self, plan: MergePlan, shard: ShardPlan, workers: Workers, chunk_elements: int) -> Iterator[Piece]:
        """See the protocol."""
        checkpoint = plan.binding.checkpoint
        parts = (
            chunk for tensor in shard.tensors for chunk in chunks(tensor, checkpoint, workers.device, chunk_elements)
        )
        for chunk, view, seen in workers.evaluate(parts):
            yield view, chunk.tensor if chunk.compute is not None else None, seen

    def others(self, plan: MergePlan, written: tuple[RecordedFile, ...]) -> Mapping[str, bytes]:
        """See the protocol."""
        indices = index_files([tensor.spec for tensor in plan.tensors], plan.binding.checkpoint)
        return {name: json_text(index) for name, index in indices}
