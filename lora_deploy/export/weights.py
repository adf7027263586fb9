"""Stream a checkpoint's tensors through a binding table into the files that its graphs read.

Promise: no model object, no tracing; memory is a few blocks of a stored checkpoint, or one initializer and what it is
made of where values are computed or rounded, whatever the model's size. The files are written whole or not at all,
hashed while they are written, and depend on tensors and table alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lora_deploy.artifact import Artifact
from lora_deploy.errors import ExportError
from lora_deploy.export.binding_table import CONSTANTS_NAME, BindingTable, Kept, Slot, taken_tensors
from lora_deploy.export.graphs import GraphSet
from lora_deploy.export.move import Part, moved
from lora_deploy.export.sources import CheckpointSource, WeightSource, require_tensors
from lora_deploy.merge.progress import Progress, reporting
from lora_deploy.safetensors_file import write_file
from lora_deploy.tensors import DType

if TYPE_CHECKING:
    from torch import Tensor

_WRITE_BYTES = 1 << 23


def write_weights(
    source: WeightSource, graphs: GraphSet, table: BindingTable, folder: Path, progress: Progress | None = None
) -> list[Artifact]:
    """Write every file of weights that the graphs refer to and that is theirs alone.

    Raises:
        ExportError: The source lacks a tensor, or one does not fit its place.
        DiskSpaceError, MergeError: A file cannot be written, or a value cannot be merged.
    """
    slots = [slot for slot in table.slots if slot.file in table.files]
    require_tensors(source, _names(slots))
    artifacts = []
    with reporting(progress, "writing weights", sum(slot.n_bytes for slot in slots)) as advance:
        for file in table.files:
            own = [slot for slot in slots if slot.file == file]
            contents = _contents(source, own, graphs.folder / CONSTANTS_NAME, advance)
            artifacts.append(write_file(folder / file, b"", contents, root=folder))
    return artifacts


def _contents(
    source: WeightSource, slots: list[Slot], constants: Path, advance: Callable[[int], None]
) -> Iterator[memoryview]:
    """The bytes of a file, with zeros between slots."""
    end = 0
    for offset, content in _parts(source, slots, constants):
        if offset < end:
            raise ExportError(f"{slots[0].file}: byte {offset}: {end} bytes were made before it")
        if offset > end:
            yield memoryview(bytes(offset - end))
        for start in range(0, content.nbytes, _WRITE_BYTES):
            part = content[start : start + _WRITE_BYTES]
            yield part
            advance(part.nbytes)
        end = offset + content.nbytes


def _parts(source: WeightSource, slots: list[Slot], constants: Path) -> Iterator[Part]:
    if isinstance(source, CheckpointSource):
        yield from moved(source.checkpoint, slots, lambda slot: _made(slot, source.tensors(_names([slot])), constants))
        return
    tensors = source.tensors(_names(slots))
    for slot in slots:
        yield slot.offset, _made(slot, tensors, constants)


def _names(slots: Iterable[Slot]) -> list[str]:
    return [taken.tensor for slot in slots for taken in taken_tensors(slot.origin)]


def _made(slot: Slot, tensors: Iterator[Tensor], constants: Path) -> memoryview:
    """Make all bytes of a slot at once; ``tensors`` gives what it is made of next."""
    if isinstance(slot.origin, Kept):
        with constants.open("rb") as stream:
            stream.seek(slot.origin.start)
            content = memoryview(stream.read(slot.n_bytes))
    else:
        from lora_deploy.export.apply import materialise
        from lora_deploy.merge.shard import bytes_of
        from lora_deploy.rounding import torch_dtype

        content = bytes_of(materialise(slot.origin, torch_dtype(DType(slot.dtype)), tensors))
    if content.nbytes != slot.n_bytes:
        raise ExportError(f"{slot.file}: byte {slot.offset}: made {content.nbytes} bytes, expected {slot.n_bytes}")
    return content
