"""Write a merge into an existing export: copy its files, with merged weights in their places."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping

from torch import Tensor

from lora_deploy.checkpoint import contained_path, read_json
from lora_deploy.export.apply import materialise
from lora_deploy.export.binding_table import Slot, taken_tensors
from lora_deploy.export.existing.base import OnnxBase, map_file
from lora_deploy.export.existing.plan import PatchedFile
from lora_deploy.export.record import RECORD_NAME, compose, digest_of, read_record
from lora_deploy.merge.exact import BlockFacts
from lora_deploy.merge.form import Piece
from lora_deploy.merge.identity import identify
from lora_deploy.merge.local import Workers
from lora_deploy.merge.plan import MergePlan, PlannedTensor, ShardPlan
from lora_deploy.merge.record import RecordedFile
from lora_deploy.merge.shard import COPY_BYTES, bytes_of
from lora_deploy.merge.whole import whole_tensors
from lora_deploy.rounding import torch_dtype
from lora_deploy.tensors import DType


class OnnxForm:
    """An export with the graphs that it had."""

    def contents(self, plan: MergePlan, shard: ShardPlan, workers: Workers, chunk_elements: int) -> Iterator[Piece]:
        """See the protocol: bytes between slots are the base's, slots are made of merged tensors."""
        base = plan.binding.checkpoint
        assert isinstance(shard, PatchedFile)  # noqa: S101 - the plan has no others
        by_name = {tensor.spec.name: tensor for tensor in plan.tensors}
        names = [taken.tensor for slot in shard.slots for taken in taken_tensors(slot.origin)]
        merged = whole_tensors((by_name[name] for name in names), base, workers, chunk_elements)
        noted: set[str] = set()
        content, end = map_file(contained_path(base.root, shard.file)), 0
        for slot in shard.slots:
            yield from _copied(content, end, slot.offset)
            yield from _made(slot, merged, noted)
            end = slot.offset + slot.n_bytes
        yield from _copied(content, end, shard.n_bytes)

    def others(self, plan: MergePlan, written: tuple[RecordedFile, ...]) -> Mapping[str, bytes]:
        """See the protocol: the record of an export of ours, which is another's now."""
        base = plan.binding.checkpoint
        assert isinstance(base, OnnxBase)  # noqa: S101 - the plan has no others
        if not base.is_own:
            return {}
        before = read_record(base.root)
        source = {"merge": identify(plan, None)}
        digest = digest_of({"export": before.digest, "source": source})
        record = before.model_copy(update={"digest": digest, "source": source, "artifacts": written})
        components = read_json(base.root / RECORD_NAME).get("components", {})
        metadata = {name: component["metadata"] for name, component in components.items()}
        return {RECORD_NAME: compose(record, metadata).encode()}


def _copied(content: mmap.mmap | None, start: int, stop: int) -> Iterator[Piece]:
    for first in range(start, stop, COPY_BYTES):
        assert content is not None  # noqa: S101 - an empty file has nothing to copy
        yield memoryview(content)[first : min(first + COPY_BYTES, stop)], None, BlockFacts()


def _made(slot: Slot, merged: Iterator[tuple[PlannedTensor, Tensor, BlockFacts]], noted: set[str]) -> Iterator[Piece]:
    """Make a slot of the next tensors; what was seen of each is said once, before the bytes."""
    seen: list[tuple[PlannedTensor, BlockFacts]] = []

    def tensors() -> Iterator[Tensor]:
        for tensor, values, facts in merged:
            seen.append((tensor, facts))
            yield values

    made = bytes_of(materialise(slot.origin, torch_dtype(DType(slot.dtype)), tensors()))
    for tensor, facts in seen:
        if tensor.updates and tensor.spec.name not in noted:
            noted.add(tensor.spec.name)
            yield memoryview(b""), tensor, facts
    for first in range(0, made.nbytes, COPY_BYTES):
        yield made[first : first + COPY_BYTES], None, BlockFacts()
