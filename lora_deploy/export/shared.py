"""Point graphs straight into the merged checkpoint's own files, where the layout allows.

Promise: only a tensor that the graph reads as it is stored (same dtype, same order) is shared; the rest goes to the
graphs' own files. How much is shared is said in bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from lora_deploy.checkpoint import Checkpoint
from lora_deploy.export.binding_table import BindingTable, Layout, Slot, Taken
from lora_deploy.export.canonical import load_graph
from lora_deploy.export.graphs import GraphSet
from lora_deploy.export.sources import CheckpointSource, WeightSource


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Shared:
    """Graphs and the table that says where their weights are."""

    graphs: Mapping[str, bytes]
    """Graph files by name."""
    table: BindingTable
    share: float
    """[0..1] Part of the weights' bytes that lies in the checkpoint's files."""

    @classmethod
    def nothing(cls, graphs: GraphSet) -> Self:
        """Leave graphs and table as they are in the cache."""
        files = [component.file for component in graphs.table.components.values()]
        return cls(graphs={file: (graphs.folder / file).read_bytes() for file in files}, table=graphs.table, share=0.0)


def share(source: WeightSource, graphs: GraphSet) -> Shared:
    """Point what can be shared into the checkpoint's files, and lay out the rest anew."""
    assert isinstance(source, CheckpointSource)  # noqa: S101 - the plan allows nothing else
    layout, slots, n_shared = Layout(), [], 0
    for slot in graphs.table.slots:
        found = _stored(source.checkpoint, slot)
        if found is not None:
            n_shared += slot.n_bytes
            slots.append(found)
        else:
            position = layout.place(slot.file, slot.dtype, slot.shape, slot.n_bytes, slot.origin)
            slots.append(layout.slots[position])
    table = graphs.table.model_copy(update={"slots": tuple(slots)})
    n_bytes = sum(slot.n_bytes for slot in slots)
    files = {component.file: _pointed(graphs, name, table) for name, component in table.components.items()}
    return Shared(graphs=files, table=table, share=n_shared / n_bytes if n_bytes else 0.0)


def _stored(checkpoint: Checkpoint, slot: Slot) -> Slot | None:
    """The slot in the checkpoint's own file, if that holds the very bytes."""
    origin = slot.origin
    if not isinstance(origin, Taken) or origin.permutation is not None or origin.plus:
        return None
    spec = checkpoint.tensors[origin.tensor]
    if spec.dtype.value != slot.dtype:
        return None
    return slot.model_copy(update={"file": spec.file, "offset": checkpoint.data_starts[spec.file] + spec.start})


def _pointed(graphs: GraphSet, name: str, table: BindingTable) -> bytes:
    """A graph file whose weights are where the table says."""
    component = table.components[name]
    model: Any = load_graph(graphs.folder / component.file)
    for tensor in model.graph.initializer:
        position = component.slots.get(tensor.name)
        if position is not None:
            slot = table.slots[position]
            places = {"location": slot.file, "offset": str(slot.offset), "length": str(slot.n_bytes)}
            for entry in tensor.external_data:
                entry.value = places.get(entry.key, entry.value)
    content: bytes = model.SerializeToString(deterministic=True)
    return content
