"""Bind drawn graphs to checkpoint tensors: make the table, and the graph files without weights.

Promise: an initializer is what the table says, by content, in both drawings; or it is a constant, the same in both,
which no weight can be; or there is no table. The two graphs are one file, byte for byte but for initializers, so no
weight decided their structure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_deploy.errors import ExportError
from lora_deploy.export.apply import materialise
from lora_deploy.export.binding_table import (
    CONSTANTS_NAME,
    SCHEMA,
    BindingTable,
    BoundComponent,
    Kept,
    Layout,
    Origin,
    taken_tensors,
)
from lora_deploy.export.drawn import external, initializers, inline, values_of, without_metadata
from lora_deploy.export.interface import Drawing
from lora_deploy.export.matching import Matcher
from lora_deploy.merge.shard import bytes_of
from lora_deploy.rounding import dtype_of

MAX_INLINE_BYTES = 1 << 16
"""Larger constants go to a file of their own beside the graph."""
_MAX_LISTED = 8


@dataclass(frozen=True, slots=True)
class _Found:
    """An initializer of the first drawing."""

    sha256: str
    origin: Origin | None


@dataclass(frozen=True, slots=True)
class _First:
    """A component's first drawing."""

    structure: bytes
    found: Mapping[str, _Found]


class Binder:
    """Takes drawings, two a component, and makes the table."""

    def __init__(self, checkpoints: tuple[Mapping[str, Tensor], Mapping[str, Tensor]], folder: Path) -> None:
        """Write graphs to ``folder``; the checkpoints are those that were drawn with."""
        self._second = checkpoints[1]
        self._folder = folder
        self._matcher = Matcher(checkpoints[0])
        self._layout = Layout()
        self._components: dict[str, BoundComponent] = {}
        self._firsts: dict[str, _First] = {}
        self._constants = bytearray()

    def take(self, drawing: Drawing) -> None:
        """Bind one drawing: the first of a component is explained, the second must confirm it.

        Raises:
            ExportError: An initializer is not explained, or the weights decided the structure of the graph.
        """
        if drawing.seed == 0:
            self._firsts[drawing.component] = self._explained(drawing)
        else:
            self._confirm(drawing, self._firsts.pop(drawing.component))

    def finish(self) -> BindingTable:
        """Give the table of everything that was taken; large constants are written."""
        if self._constants:
            (self._folder / CONSTANTS_NAME).write_bytes(self._constants)
        slots = tuple(self._layout.slots)
        used = {taken.tensor for slot in slots for taken in taken_tensors(slot.origin)}
        unused = tuple(name for name in self._second if name not in used)
        return BindingTable(schema=SCHEMA, slots=slots, components=self._components, unused=unused)

    def _explained(self, drawing: Drawing) -> _First:
        found = {}
        for name, value in initializers(drawing.model).items():
            values = values_of(value)
            # An integer is part of the blueprint: the same in both drawings, wherever it comes from.
            origin = self._matcher.explain(values) if values.dtype.is_floating_point else None
            found[name] = _Found(_sha256(values), origin)
        return _First(_structure(drawing.model), found)

    def _confirm(self, drawing: Drawing, first: _First) -> None:
        component, file = drawing.component, drawing.file
        contents = {name: values_of(value) for name, value in initializers(drawing.model).items()}
        digests = {name: _sha256(values) for name, values in contents.items()}
        weights = {name: values for name, values in contents.items() if digests[name] != first.found[name].sha256}
        slots: dict[str, int] = {}
        unexplained = []
        for name, values in weights.items():
            origin = first.found[name].origin
            if origin is None or not self._reproduces(origin, values):
                unexplained.append(f"{name} {dtype_of(values).long_name}{list(values.shape)}")
            else:
                slots[name] = self._place(file, values, origin)
        if unexplained:
            raise _refusal(component, unexplained)
        constants = {name: digests[name] for name in contents if name not in weights}
        for name, sha256 in constants.items():
            if contents[name].nbytes > MAX_INLINE_BYTES:
                kept = Kept(start=len(self._constants), sha256=sha256)
                self._constants += bytes_of(contents[name])
                slots[name] = self._place(file, contents[name], kept)
        if _structure(drawing.model) != first.structure:
            raise ExportError(f"{component}: its graph depends on the weights' values, so it belongs to no base")
        inline = {name: sha256 for name, sha256 in constants.items() if name not in slots}
        self._components[component] = BoundComponent(file=file, slots=slots, constants=inline)
        self._write(drawing, slots, self._folder / file)

    def _reproduces(self, origin: Origin, values: Tensor) -> bool:
        tensors = (self._second[taken.tensor] for taken in taken_tensors(origin))
        made = materialise(origin, values.dtype, tensors)
        return made.shape == values.shape and _sha256(made) == _sha256(values)

    def _place(self, file: str, values: Tensor, origin: Origin) -> int:
        dtype = dtype_of(values).value
        return self._layout.place(f"{file}.data", dtype, tuple(values.shape), values.nbytes, origin)

    def _write(self, drawing: Drawing, slots: Mapping[str, int], path: Path) -> None:
        for name, value in initializers(drawing.model).items():
            if name in slots:
                slot = self._layout.slots[slots[name]]
                value.const_value = external(value, slot.name, slot.offset, slot.n_bytes)
            else:
                value.const_value = inline(value)  # a maker's own file of weights is not there any more
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(without_metadata(drawing.model))


def _structure(model: Any) -> bytes:  # noqa: ANN401 - an onnx_ir.Model
    """The graph's file without any initializer's values."""
    before = {name: value.const_value for name, value in initializers(model).items()}
    try:
        for value in initializers(model).values():
            value.const_value = external(value, "weights", 0, 0)
        return without_metadata(model)
    finally:
        for name, value in initializers(model).items():
            value.const_value = before[name]


def _refusal(component: str, unexplained: list[str]) -> ExportError:
    listed = ", ".join(unexplained[:_MAX_LISTED])
    more = f" and {len(unexplained) - _MAX_LISTED} more" if len(unexplained) > _MAX_LISTED else ""
    return ExportError(
        f"{component}: {len(unexplained)} initializers depend on the weights and come from no tensor as a whole, "
        f"transposed or joined: {listed}{more}",
        hint="this architecture cannot be exported yet; please report it with its config.json",
        code="unexplained-initializer",
    )


def _sha256(values: Tensor) -> str:
    return hashlib.sha256(bytes_of(values)).hexdigest()
