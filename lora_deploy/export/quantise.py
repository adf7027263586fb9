"""Rewrite the graphs of an export so that they read quantised weights, and say where those come from.

A ``MatMul`` whose second operand is a matrix of weights becomes what onnxruntime's own tool makes of it; everything
else stays. What is read by another operator (an embedding by ``Gather``, a tied head through a ``Transpose``, a small
head by ``Gemm``) stays in the graph's own format, and is listed.

Promise (law 8): the rewritten graph depends on the graph, on shapes and on options, never on a weight, so it is the
base's. A weight that several products or several graphs read is quantised once and stored once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from lora_deploy.errors import ExportError
from lora_deploy.export.binding_table import BindingTable, BoundComponent, Joined, Layout, Quantised, Slot, Span, Taken
from lora_deploy.export.canonical import load_graph
from lora_deploy.export.graphs import GraphSet
from lora_deploy.export.quantisation import Quantisation
from lora_deploy.export.quantiser import ACTIVATION, NODE, PRODUCT, WEIGHT, Rewriting, rewriting
from lora_deploy.export.record import RecordedQuantisation, RecordedWeight
from lora_deploy.export.shared import Shared
from lora_deploy.rounding import torch_dtype
from lora_deploy.tensors import DType

Proto: TypeAlias = Any
"""A message of the onnx package, which has no types."""


def quantise(graphs: GraphSet, by: Quantisation) -> tuple[Shared, RecordedQuantisation]:
    """Rewrite every graph; weights are not read.

    Raises:
        ExportError: No graph multiplies by a matrix of weights.
    """
    layout, files, components = Layout(), {}, {}
    weights: dict[int, RecordedWeight] = {}
    for name, component in graphs.table.components.items():
        rewritten = _Rewritten(table=graphs.table, component=component, layout=layout, by=by)
        files[component.file] = rewritten.graph(load_graph(graphs.folder / component.file))
        components[name] = rewritten.bound()
        for position, weight in rewritten.recorded():
            weights.setdefault(position, weight)
    if not any(weight.is_quantised for weight in weights.values()):
        raise ExportError(
            f"--quantize {by.method}: no graph multiplies by a matrix of weights, so there is nothing to quantise",
            hint="export without --quantize",
            code="nothing-to-quantise",
        )
    table = graphs.table.model_copy(update={"slots": tuple(layout.slots), "components": components})
    recorded = RecordedQuantisation(
        n_bytes_before=sum(slot.n_bytes for slot in graphs.table.slots),
        n_bytes=sum(slot.n_bytes for slot in layout.slots),
        weights=tuple(weights[position] for position in sorted(weights)),
    )
    return Shared(graphs=files, table=table, share=0.0), recorded


@dataclass(slots=True, kw_only=True, eq=False)
class _Rewritten:
    """One graph on its way."""

    table: BindingTable
    component: BoundComponent
    layout: Layout
    """Of all graphs' weights."""
    by: Quantisation
    slots: dict[str, int] = field(default_factory=dict)
    spans: dict[str, Span] = field(default_factory=dict)
    rewritings: dict[str, Rewriting] = field(default_factory=dict)
    """By weight."""
    parts: dict[str, Proto] = field(default_factory=dict)
    """New initializers by name."""
    _made: set[str] = field(default_factory=set)
    """Values that were computed from activations before: products of one activation share them."""

    def graph(self, model: Proto) -> bytes:
        """Rewrite a graph file."""
        graph = model.graph
        nodes = [new for node in graph.node for new in self._rewritten(node)]
        del graph.node[:]
        graph.node.extend(nodes)
        read = {name for node in _all_nodes(graph) for name in node.input} | {value.name for value in graph.output}
        kept = [tensor for tensor in graph.initializer if tensor.name in read or tensor.name not in self.rewritings]
        del graph.initializer[:]
        graph.initializer.extend(kept)
        graph.initializer.extend(self.parts.values())
        self._place({tensor.name for tensor in kept})
        for tensor in graph.initializer:
            if tensor.name in self.slots:
                self._point(tensor)
        self._declare(model)
        content: bytes = model.SerializeToString(deterministic=True)
        return content

    def bound(self) -> BoundComponent:
        """What the table says of the graph now."""
        return self.component.model_copy(update={"slots": self.slots, "spans": self.spans})

    def recorded(self) -> Iterator[tuple[int, RecordedWeight]]:
        """Every weight by its place in the table before, with what became of it."""
        for name, position in self.component.slots.items():
            before = self.table.slots[position].n_bytes
            n_bytes = self.rewritings[name].n_bytes if name in self.rewritings else 0
            yield (
                position,
                RecordedWeight(
                    graph=self.component.file,
                    initializer=name,
                    n_bytes_before=before,
                    n_bytes=n_bytes + (before if name in self.slots else 0),
                    is_quantised=name in self.rewritings,
                ),
            )

    def _rewritten(self, node: Proto) -> Iterator[Proto]:
        slot = self._weight_of(node)
        if slot is None:
            yield node
            return
        weight = node.input[1]
        made = rewriting(slot.shape, torch_dtype(DType(slot.dtype)), self.by)
        names = {ACTIVATION: node.input[0], WEIGHT: weight, PRODUCT: node.output[0], NODE: node.name or node.output[0]}
        self.rewritings[weight] = made
        for part in made.parts.values():
            tensor = _copied(part, names)
            self.parts[tensor.name] = tensor
        for template in made.nodes:
            new = _copied(template, names)
            new.input[:] = [_renamed(name, names) for name in new.input]
            new.output[:] = [_renamed(name, names) for name in new.output]
            if not self._made.issuperset(new.output):
                self._made.update(new.output)
                yield new

    def _weight_of(self, node: Proto) -> Slot | None:
        """The slot of the matrix that a node multiplies by, where the tools quantise such a product."""
        if node.op_type != "MatMul" or node.domain or node.input[1] not in self.component.slots:
            return None
        slot = self.table.slots[self.component.slots[node.input[1]]]
        return slot if len(slot.shape) == 2 and isinstance(slot.origin, Taken | Joined) else None

    def _place(self, kept: set[str]) -> None:
        """Give every weight its place, in the order of before: packed, as it is, or both."""
        file = f"{self.component.file}.data"
        for name, position in self.component.slots.items():
            slot, made = self.table.slots[position], self.rewritings.get(name)
            if made is not None:
                assert isinstance(slot.origin, Taken | Joined)  # noqa: S101 - or it would not have been rewritten
                origin = Quantised(weight=slot.origin, dtype=slot.dtype, by=self.by)
                place = self.layout.place(file, DType.U8.value, (made.n_bytes,), made.n_bytes, origin)
                for part, span in made.spans.items():
                    renamed = _renamed(part, {WEIGHT: name})
                    self.slots[renamed], self.spans[renamed] = place, span
            if name in kept:
                self.slots[name] = self.layout.place(file, slot.dtype, slot.shape, slot.n_bytes, slot.origin)

    def _point(self, tensor: Proto) -> None:
        """Make an initializer read its place."""
        slot, span = self.layout.slots[self.slots[tensor.name]], self.spans.get(tensor.name)
        start, n_bytes = (slot.offset + span.start, span.n_bytes) if span else (slot.offset, slot.n_bytes)
        del tensor.external_data[:]
        tensor.ClearField("raw_data")
        tensor.data_location = type(tensor).EXTERNAL
        for key, value in (("location", slot.file), ("offset", start), ("length", n_bytes)):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, str(value)

    def _declare(self, model: Proto) -> None:
        """Import the operators that the new nodes are of."""
        known = {opset.domain for opset in model.opset_import}
        for made in self.rewritings.values():
            for domain, version in made.opsets.items():
                if domain not in known:
                    known.add(domain)
                    opset = model.opset_import.add()
                    opset.domain, opset.version = domain, version


def _copied(template: Proto, names: dict[str, str]) -> Proto:
    new = type(template)()
    new.CopyFrom(template)
    new.name = _renamed(new.name, names)
    return new


def _renamed(name: str, names: dict[str, str]) -> str:
    for placeholder, real in names.items():
        name = name.replace(placeholder, real)
    return name


def _all_nodes(graph: Proto) -> Iterator[Proto]:
    """Nodes of a graph and of the graphs within."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _all_nodes(inner)
