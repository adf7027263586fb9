"""Whole tensors of a plan, one after the other, where something needs more of one than a row block.

Promise: memory is one tensor and the chunks that workers are ahead; the values are those that a merge writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from lora_deploy.checkpoint import Checkpoint
from lora_deploy.merge.exact import BlockFacts
from lora_deploy.merge.local import Workers
from lora_deploy.merge.plan import PlannedTensor
from lora_deploy.merge.shard import chunks
from lora_deploy.rounding import torch_dtype


def whole_tensors(
    planned: Iterable[PlannedTensor], checkpoint: Checkpoint, workers: Workers, chunk_elements: int
) -> Iterator[tuple[PlannedTensor, Tensor, BlockFacts]]:
    """Compute tensors in order; the workers are already at the next while one is used.

    Raises:
        MergeError: A value cannot be merged or stored.
    """
    parts = (chunk for tensor in planned for chunk in chunks(tensor, checkpoint, workers.device, chunk_elements))
    buffer, facts = bytearray(), BlockFacts()
    for chunk, view, seen in workers.evaluate(parts):
        spec = chunk.tensor.spec
        if chunk.start == 0:
            buffer, facts = bytearray(spec.n_bytes), BlockFacts()
        buffer[chunk.start : chunk.stop] = view
        facts.add(seen)
        if chunk.stop == spec.n_bytes:
            yield chunk.tensor, torch.frombuffer(buffer, dtype=torch_dtype(spec.dtype)).view(spec.shape), facts
