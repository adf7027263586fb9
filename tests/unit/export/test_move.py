"""Bytes that are moved block by block are those that the tensor library makes of a whole; no such library is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lora_deploy.errors import ExportError
from lora_deploy.export import move
from lora_deploy.export.apply import materialise
from lora_deploy.export.binding_table import Joined, Kept, Origin, Slot, Taken, shape_of, taken_tensors
from lora_deploy.export.execute import execute_export
from lora_deploy.export.sources import mapped
from lora_deploy.merge.shard import bytes_of
from lora_deploy.rounding import dtype_of
from tests.builders import make_checkpoint
from tests.unit.export.hand_made import checkpoint, planned

Arrays = dict[str, Tensor]


def _taken(tensor: str, *shape: int, turned: tuple[int, ...] | None = None, plus: float = 0.0) -> Taken:
    return Taken(tensor=tensor, permutation=turned, plus=plus, shape=shape)


TRANSPOSED = _taken("wide", 300, 140, turned=(1, 0))
ORIGINS: dict[str, Origin] = {
    "as is": _taken("wide", 140, 300),
    "as is, in another shape": _taken("wide", 10, 14, 300),
    "transposed": TRANSPOSED,
    "transposed, in another shape": _taken("wide", 30, 10, 140, turned=(1, 0)),
    "scalar": _taken("scalar"),
    "empty": _taken("empty", 0, 3),
    "plus one": _taken("vector", 7, plus=1.0),
    "convolution": _taken("conv", 4, 5, 3, 2, turned=(2, 3, 1, 0)),
    "three axes": _taken("stack", 3, 200, 130, turned=(0, 2, 1)),
    "side by side": Joined(axis=1, parts=(TRANSPOSED, _taken("tall", 300, 140), TRANSPOSED)),
    "one below the other": Joined(axis=0, parts=(TRANSPOSED, _taken("tall", 300, 140))),
    "joined of joined": Joined(axis=1, parts=(Joined(axis=0, parts=(_taken("wide", 140, 300),) * 2),) * 2),
    "stacked": Joined(axis=0, is_stack=True, parts=(TRANSPOSED, _taken("tall", 300, 140), TRANSPOSED)),
    "stacked on the last axis": Joined(axis=2, is_stack=True, parts=(TRANSPOSED, _taken("tall", 300, 140))),
    "stacked of joined": Joined(
        axis=0, is_stack=True, parts=(Joined(axis=1, parts=(TRANSPOSED, _taken("tall", 300, 140))),) * 3
    ),
    "scalars": Joined(axis=0, is_stack=True, parts=(_taken("scalar"), _taken("scalar"))),
    "vectors, one shifted": Joined(axis=0, parts=(_taken("vector", 7), _taken("vector", 7, plus=1.0))),
}


def _tensors(dtype: torch.dtype) -> Arrays:
    torch.manual_seed(0)
    shapes = {"wide": (140, 300), "tall": (300, 140), "vector": (7,), "scalar": (), "empty": (0, 3)}
    shapes |= {"conv": (2, 3, 4, 5), "stack": (3, 130, 200)}
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def _slot(origin: Origin, dtype: torch.dtype, offset: int = 0) -> Slot:
    shape = shape_of(origin)
    n_bytes = torch.Size(shape).numel() * dtype.itemsize
    name = dtype_of(torch.empty((), dtype=dtype)).value
    return Slot(file="w", offset=offset, n_bytes=n_bytes, dtype=name, shape=shape, origin=origin)


def _unmoved(slot: Slot) -> memoryview:
    raise AssertionError(f"{slot.origin} should have been moved")


@pytest.mark.parametrize("block_bytes", [1, 4096, 1 << 22])
@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_every_origin_gives_the_bytes_that_the_tensor_library_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: torch.dtype, wanted: torch.dtype, block_bytes: int
) -> None:
    monkeypatch.setattr(move, "BLOCK_BYTES", block_bytes)
    found = make_checkpoint(tmp_path, _tensors(stored))
    origins = [origin for name, origin in ORIGINS.items() if wanted is torch.float32 or "plus" not in name]
    origins = [o for o in origins if wanted is torch.float32 or not any(t.plus for t in taken_tensors(o))]
    slots, end = [], 0
    for origin in origins:
        slots.append(_slot(origin, wanted, end))
        end += slots[-1].n_bytes
    made = bytearray(end)
    for offset, part in move.moved(found, slots, _unmoved):
        made[offset : offset + part.nbytes] = part
    for origin, slot in zip(origins, slots, strict=True):
        tensors = (mapped(found, taken.tensor) for taken in taken_tensors(origin))
        expected = bytes(bytes_of(materialise(origin, wanted, tensors)))
        assert made[slot.offset : slot.offset + slot.n_bytes] == expected, origin


def test_what_needs_rounding_and_what_is_a_constant_is_left_to_others(tmp_path: Path) -> None:
    found = make_checkpoint(tmp_path, _tensors(torch.float32) | {"vector": torch.ones(7, dtype=torch.bfloat16)})
    narrowed = _slot(TRANSPOSED, torch.float16)
    constant = Slot(file="w", offset=0, n_bytes=4, dtype="F32", shape=(1,), origin=Kept(start=0, sha256=""))
    shifted = _slot(_taken("vector", 7, plus=1.0), torch.bfloat16)
    asked: list[Slot] = []

    def rest(slot: Slot) -> memoryview:
        asked.append(slot)
        return memoryview(b"rest")

    assert [bytes(part) for _, part in move.moved(found, [narrowed, constant, shifted], rest)] == [b"rest"] * 3
    assert sorted(asked, key=id) == sorted([narrowed, constant, shifted], key=id)


def test_a_tensor_of_another_size_is_refused(tmp_path: Path) -> None:
    found = make_checkpoint(tmp_path, _tensors(torch.float32))
    slot = _slot(_taken("vector", 8), torch.float32)
    with pytest.raises(ExportError, match=r"vector: found shape \(7,\), the graph was made for \(8,\)"):
        list(move.moved(found, [slot], _unmoved))


def test_few_blocks_are_made_ahead_of_whoever_takes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(move, "BLOCK_BYTES", 140 * 4)
    made: list[int] = []
    block: Callable[..., memoryview] = move._block
    monkeypatch.setattr(move, "_block", lambda *arguments: made.append(1) or block(*arguments))  # type: ignore[func-returns-value]
    found = make_checkpoint(tmp_path, _tensors(torch.float32))
    parts = move.moved(found, [_slot(TRANSPOSED, torch.float32)], _unmoved)
    for number in range(1, 10):
        next(parts)
        assert len(made) <= number + move._N_AHEAD
    parts.close()  # type: ignore[attr-defined]
    assert len(made) < 20


def test_binding_weights_to_a_known_graph_loads_no_tensor_library(tmp_path: Path) -> None:
    found = checkpoint(tmp_path / "m")
    first = execute_export(planned(found), tmp_path / "first")
    script = f"""
import sys
from lora_deploy.cli import main
sys.argv = ["lora-deploy", "export", {str(found.root)!r}, "--onnx", "-o", {str(tmp_path / "second")!r}, "-q"]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
assert not {{"torch", "transformers", "onnx", "onnx_ir", "onnxruntime"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    for file in first.record.artifacts:
        assert (tmp_path / "second" / file.path).read_bytes() == (first.root / file.path).read_bytes()
