"""What kind of folder a merge becomes: how the bytes of its files come about, and what lies beside them.

Promise: a form decides no value. Which tensors there are, in which format and with which updates, is the plan's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from lora_deploy.merge.exact import BlockFacts
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
    """A checkpoint: every tensor in the plan's order, and an index where there are several files."""

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
        if len(plan.shards) == 1:
            return {}
        return {"model.safetensors.index.json": json_file(_index(plan))}


def json_file(value: Mapping[str, Any]) -> bytes:
    """Write a JSON file's content: sorted keys, two spaces, one final newline."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _index(plan: MergePlan) -> dict[str, Any]:
    names = {tensor.spec.name: tensor.spec.file for tensor in plan.tensors}
    total = sum(tensor.spec.n_bytes for tensor in plan.tensors)
    n_elements = sum(tensor.spec.n_elements for tensor in plan.tensors)
    return {
        "metadata": {"total_parameters": n_elements, "total_size": total},
        "weight_map": dict(sorted(names.items())),
    }
