"""Stream a checkpoint's tensors through a binding table into the files that its graphs read.

Promise: no model object, no tracing; memory is one initializer and what it is made of, whatever the model's size. The
files are written whole or not at all, hashed while they are written, and depend on tensors and table alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from lora_deploy.artifact import Artifact
from lora_deploy.errors import ExportError
from lora_deploy.export.apply import materialise
from lora_deploy.export.bind import CONSTANTS_NAME
from lora_deploy.export.binding_table import BindingTable, Kept, Slot, taken_tensors
from lora_deploy.export.graphs import GraphSet
from lora_deploy.export.sources import WeightSource, require_tensors
from lora_deploy.merge.progress import Progress, reporting
from lora_deploy.merge.shard import bytes_of
from lora_deploy.rounding import torch_dtype
from lora_deploy.safetensors_file import write_file
from lora_deploy.tensors import DType

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
    require_tensors(source, [taken.tensor for slot in slots for taken in taken_tensors(slot.origin)])
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
    tensors = source.tensors(taken.tensor for slot in slots for taken in taken_tensors(slot.origin))
    end = 0
    for slot in slots:
        if slot.offset > end:
            yield memoryview(bytes(slot.offset - end))
        content = bytes_of(_values(slot, tensors, constants))
        if content.nbytes != slot.n_bytes:
            raise ExportError(f"{slot.file}: byte {slot.offset}: made {content.nbytes} bytes, expected {slot.n_bytes}")
        for start in range(0, slot.n_bytes, _WRITE_BYTES):
            part = content[start : start + _WRITE_BYTES]
            yield part
            advance(part.nbytes)
        end = slot.offset + slot.n_bytes


def _values(slot: Slot, tensors: Iterator[Tensor], constants: Path) -> Tensor:
    dtype = torch_dtype(DType(slot.dtype))
    if isinstance(slot.origin, Kept):
        import torch

        with constants.open("rb") as stream:
            stream.seek(slot.origin.start)
            return torch.frombuffer(bytearray(stream.read(slot.n_bytes)), dtype=dtype)
    return materialise(slot.origin, dtype, tensors)
