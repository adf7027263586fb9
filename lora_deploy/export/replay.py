"""Replay an export: its graphs read what the binding table says, and find there what the weights give.

Promise: every initializer of every graph is looked at, every byte of a slot is made again and compared, and the folder
is only read. With equal graphs, this is what makes a merged export the base's with other weights, and nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from torch import Tensor

from lora_deploy.checkpoint import contained_path
from lora_deploy.errors import InputError
from lora_deploy.export.apply import materialise
from lora_deploy.export.binding_table import BindingTable, BoundComponent, Kept, Slot, Span, describe, taken_tensors
from lora_deploy.export.canonical import load_graph, raw_values
from lora_deploy.export.graphs import TABLE_NAME
from lora_deploy.export.sources import WeightSource, require_tensors
from lora_deploy.merge.progress import Progress, reporting
from lora_deploy.merge.shard import bytes_of
from lora_deploy.rounding import torch_dtype
from lora_deploy.tensors import DType


def replay_export(source: WeightSource, folder: Path, progress: Progress | None = None) -> Iterator[str]:
    """Say what in an exported folder is not what these weights and its table give; nothing when all is.

    Raises:
        InputError: A graph or the table cannot be read.
        ExportError: The weights lack a tensor that the table names.
    """
    table = read_table(folder)
    for component in table.components.values():
        yield from misplaced(folder, component, table)
    require_tensors(source, [taken.tensor for slot in table.slots for taken in taken_tensors(slot.origin)])
    with reporting(progress, "replaying the graphs' weights", sum(slot.n_bytes for slot in table.slots)) as advance:
        yield from _stale(folder, table, source, advance)


def read_table(folder: Path) -> BindingTable:
    """Read the binding table of an export.

    Raises:
        InputError: It is none.
    """
    path = contained_path(folder, TABLE_NAME)
    try:
        return BindingTable.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise InputError(f"{path}: is not a binding table: {error}") from error


def misplaced(folder: Path, component: BoundComponent, table: BindingTable) -> Iterator[str]:
    """Compare where a graph's initializers are with where the table says they are."""
    graph = load_graph(contained_path(folder, component.file)).graph
    known = component.slots.keys() | component.constants.keys()
    names = {tensor.name for tensor in graph.initializer}
    for name in sorted(names ^ known):
        yield f"{component.file}: {name}: {'is in the table alone' if name in known else 'is not in the table'}"
    for tensor in graph.initializer:
        if tensor.name in component.slots:
            slot = table.slots[component.slots[tensor.name]]
            span = component.spans.get(tensor.name, Span(start=0, n_bytes=slot.n_bytes))
            start, length = str(slot.offset + span.start), str(span.n_bytes)
            expected = {"location": slot.name, "offset": start, "length": length}
            found = {entry.key: entry.value for entry in tensor.external_data if entry.key in expected}
            if {"offset": "0", **found} != expected:
                yield f"{component.file}: {tensor.name}: is read from {found or 'the graph'}, expected {expected}"
        elif tensor.name in component.constants:
            yield from _changed_constant(component, tensor)


def _changed_constant(component: BoundComponent, tensor: Any) -> Iterator[str]:  # noqa: ANN401 - a TensorProto
    sha256 = None if tensor.external_data else hashlib.sha256(raw_values(tensor)).hexdigest()
    if sha256 != component.constants[tensor.name]:
        yield f"{component.file}: {tensor.name}: is not the constant that the graph was made with"


def _stale(folder: Path, table: BindingTable, source: WeightSource, advance: Callable[[int], None]) -> Iterator[str]:
    """Make every slot again and compare it with the file."""
    tensors = source.tensors(taken.tensor for slot in table.slots for taken in taken_tensors(slot.origin))
    for slot in table.slots:
        found = _stored(folder, slot)
        is_same = _is_kept(slot.origin, found) if isinstance(slot.origin, Kept) else _is_made(slot, tensors, found)
        if not is_same:
            names = ", ".join(taken.tensor for taken in taken_tensors(slot.origin))
            yield f"{slot.file}: byte {slot.offset}: is not {names or 'a constant'} ({describe(slot.origin)})"
        advance(slot.n_bytes)


def _stored(folder: Path, slot: Slot) -> memoryview:
    path = contained_path(folder, slot.file)
    if path.stat().st_size < slot.offset + slot.n_bytes:
        return memoryview(b"")
    return (
        memoryview(np.memmap(path, np.uint8, "r", slot.offset, (slot.n_bytes,)).data)
        if slot.n_bytes
        else memoryview(b"")
    )


def _is_kept(origin: Kept, found: memoryview) -> bool:
    return hashlib.sha256(found).hexdigest() == origin.sha256


def _is_made(slot: Slot, tensors: Iterator[Tensor], found: memoryview) -> bool:
    made = bytes_of(materialise(slot.origin, torch_dtype(DType(slot.dtype)), tensors))
    return made.nbytes == found.nbytes and np.array_equal(np.frombuffer(made, np.uint8), np.frombuffer(found, np.uint8))
