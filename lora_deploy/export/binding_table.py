"""The binding table: for every initializer of a graph, which checkpoint tensors it comes from, and how.

Promise: the table explains every byte that is not a constant of the graph. It speaks of names, shapes and layouts only,
so it holds for every checkpoint of the same base; applying it is arithmetic-free but for casts to a wider format, the
one addition that some norms fold (``1 + w``), and quantisation where that was asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from lora_deploy.export.quantisation import Quantisation

SCHEMA: Literal[1] = 1
CONSTANTS_NAME = "constants.bin"
"""Large constants of the graphs, in the cache."""
PAGE_BYTES = 4096
"""Larger weights begin at a multiple of this, so that they can be mapped."""
_LINE_BYTES = 64
"""Smaller ones begin at a multiple of this."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Taken(_Frozen):
    """One checkpoint tensor, laid out for the graph."""

    how: Literal["taken"] = "taken"
    tensor: str
    permutation: tuple[int, ...] | None = None
    """Order of the tensor's axes; None is as stored."""
    plus: float = 0.0
    """Added in the initializer's dtype, after the cast."""
    shape: tuple[int, ...]
    """What the elements are seen as in the end, in unchanged order."""


class Joined(_Frozen):
    """Several parts, one after the other."""

    how: Literal["joined"] = "joined"
    axis: int
    """Along which they are concatenated; the parts of a stack get it as a new axis."""
    is_stack: bool = False
    parts: tuple[Origin, ...]


class Kept(_Frozen):
    """A large constant of the graph, kept beside it."""

    how: Literal["kept"] = "kept"
    start: int
    """First byte in the file of constants."""
    sha256: str


class Quantised(_Frozen):
    """A weight in packed form: all that its quantiser makes of it, in one piece."""

    how: Literal["quantised"] = "quantised"
    weight: Annotated[Taken | Joined, Field(discriminator="how")]
    dtype: str
    """Safetensors name of the format that the weight has before."""
    by: Quantisation


class Span(_Frozen):
    """A part of a slot."""

    start: int
    """First byte, from the slot's own first."""
    n_bytes: int


Origin: TypeAlias = Annotated[Taken | Joined | Kept | Quantised, Field(discriminator="how")]
Joined.model_rebuild()


class Slot(_Frozen):
    """A place in a file of weights, and what goes there."""

    file: str
    offset: int
    n_bytes: int
    dtype: str
    """Safetensors name."""
    shape: tuple[int, ...]
    origin: Origin

    @property
    def name(self) -> str:
        """The file's name for graphs, all of which lie in its own folder."""
        return self.file.rpartition("/")[2]


class BoundComponent(_Frozen):
    """One graph and its initializers."""

    file: str
    """The graph."""
    slots: dict[str, int]
    """Initializer to position in the table's slots; several may share one."""
    spans: dict[str, Span] = {}
    """Of initializers that are only a part of their slot, which part."""
    constants: dict[str, str]
    """Initializers whose values are in the graph itself, and the sha256 of those."""


class BindingTable(_Frozen):
    """Everything about where the weights of a set of graphs come from."""

    schema_version: Literal[1] = Field(SCHEMA, alias="schema")
    slots: tuple[Slot, ...]
    """By file, in the order of their offsets."""
    components: dict[str, BoundComponent]
    unused: tuple[str, ...]
    """Checkpoint tensors that no graph needs."""

    @property
    def files(self) -> tuple[str, ...]:
        """Files of weights: one a component, which may be empty where an earlier one holds everything."""
        return tuple(f"{component.file}.data" for component in self.components.values())

    def text(self) -> str:
        """The table as a file's content."""
        return self.model_dump_json(indent=1, by_alias=True, exclude_defaults=False) + "\n"


class Layout:
    """Gives slots their places while a table is made."""

    def __init__(self) -> None:
        """Begin with no slot."""
        self.slots: list[Slot] = []
        self._ends: dict[str, int] = {}
        self._known: dict[tuple[str, str, tuple[int, ...], Origin], int] = {}

    def place(self, file: str, dtype: str, shape: tuple[int, ...], n_bytes: int, origin: Origin) -> int:
        """Give the position of a slot: a known one where its folder holds the same already, else a new one."""
        key = (file.rpartition("/")[0], dtype, shape, origin)
        known = self._known.get(key)
        if known is not None:
            return known
        unit = PAGE_BYTES if n_bytes >= PAGE_BYTES else _LINE_BYTES
        offset = -(-self._ends.get(file, 0) // unit) * unit
        self._ends[file] = offset + n_bytes
        self._known[key] = len(self.slots)
        self.slots.append(Slot(file=file, offset=offset, n_bytes=n_bytes, dtype=dtype, shape=shape, origin=origin))
        return len(self.slots) - 1


def taken_tensors(origin: Origin) -> Iterator[Taken]:
    """The checkpoint tensors of an origin, in order; one may come twice."""
    if isinstance(origin, Taken):
        yield origin
    elif isinstance(origin, Joined):
        for part in origin.parts:
            yield from taken_tensors(part)
    elif isinstance(origin, Quantised):
        yield from taken_tensors(origin.weight)


def shape_of(origin: Origin) -> tuple[int, ...]:
    """The shape that an origin's values have; that of a constant, or of packed ones, is its slot's."""
    if isinstance(origin, Taken):
        return origin.shape
    if not isinstance(origin, Joined):
        raise TypeError("the shape of a constant, or of what is packed, is its slot's")
    shapes = [shape_of(part) for part in origin.parts]
    first = list(shapes[0])
    if origin.is_stack:
        first.insert(origin.axis, len(shapes))
    else:
        first[origin.axis] = sum(shape[origin.axis] for shape in shapes)
    return tuple(first)


def describe(origin: Origin) -> str:
    """Say in a word or two how an initializer comes about."""
    if isinstance(origin, Kept):
        return "constant of the graph"
    if isinstance(origin, Quantised):
        return f"{describe(origin.weight)}, {origin.by.method}"
    if isinstance(origin, Joined):
        inner = sorted({describe(part) for part in origin.parts})
        return f"{'stacked' if origin.is_stack else 'concatenated'} ({', '.join(inner)})"
    layout = "as is" if origin.permutation is None else "transposed"
    return f"{layout}, plus {origin.plus:g}" if origin.plus else layout
