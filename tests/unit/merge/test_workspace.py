"""What a worker computes in: buffers that are shared and never kept too long, and what happens when a device is full.

No accelerator is needed here: the same code runs on the CPU, and running out of memory is pretended.
"""

from __future__ import annotations

import importlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_deploy.errors import MergeError
from lora_deploy.merge.local import chosen_device, local_workers
from lora_deploy.merge.options import MergeOptions
from lora_deploy.merge.plan import plan_merge
from lora_deploy.merge.shard import Chunk, chunks
from lora_deploy.merge.workspace import TILE_ELEMENTS, Workspace, full_precision
from tests.builders import low_rank, make_checkpoint
from tests.merging import binding_of

SHARD = importlib.import_module("lora_deploy.merge.shard")
CPU = torch.device("cpu")


@pytest.fixture
def chunk(tmp_path: Path) -> Chunk:
    checkpoint = make_checkpoint(tmp_path / "base", {"w.weight": torch.randn(30, 20)})
    plan = plan_merge(binding_of(checkpoint, {"w.weight": low_rank(30, 20)}), MergeOptions())
    return next(chunks(next(plan.tensors), checkpoint, CPU))


def fail_first(monkeypatch: pytest.MonkeyPatch, n_times: int) -> list[int]:
    """Pretend that the device is full so many times; gives the tiles that were tried."""
    real, tried = SHARD.merge_rows, []

    def merging(*arguments: Any) -> Any:
        tried.append(arguments[-1].tile_elements)
        if len(tried) <= n_times:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(*arguments)

    monkeypatch.setattr(SHARD, "merge_rows", merging)
    return tried


def test_a_full_device_gets_smaller_tiles_until_they_fit(chunk: Chunk, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = bytes(chunk.evaluate(Workspace(CPU))[0])
    tried = fail_first(monkeypatch, 3)
    workspace = Workspace(CPU)
    workspace.tile_elements = 16 * TILE_ELEMENTS
    assert bytes(chunk.evaluate(workspace)[0]) == expected
    assert tried == [k * TILE_ELEMENTS for k in (16, 8, 4, 2)]
    assert workspace.tile_elements == 2 * TILE_ELEMENTS


def test_a_device_that_is_full_even_for_the_smallest_tile_is_one_clear_error(
    chunk: Chunk, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = fail_first(monkeypatch, 99)
    workspace = Workspace(CPU)
    workspace.tile_elements = 3 * TILE_ELEMENTS
    with pytest.raises(
        MergeError, match=r"^w\.weight: cpu has too little free memory for the smallest blocks"
    ) as caught:
        chunk.evaluate(workspace)
    assert tried == [3 * TILE_ELEMENTS, 3 * TILE_ELEMENTS // 2, TILE_ELEMENTS]
    assert caught.value.hint == "free some of it, or --device cpu"


def test_buffers_are_shared_by_use_and_dtype_and_dropped_when_the_tile_shrinks() -> None:
    workspace = Workspace(CPU)
    first = workspace.take("values", torch.float64, 3, 5)
    assert first.shape == (3, 5)
    assert workspace.take("values", torch.float64, 5, 3).data_ptr() == first.data_ptr()
    assert workspace.take("values", torch.float32, 3, 5).data_ptr() != first.data_ptr()
    assert workspace.take("other", torch.float64, 3, 5).data_ptr() != first.data_ptr()
    large = workspace.take("values", torch.float64, 2, TILE_ELEMENTS)
    assert workspace.take("values", torch.float64, 3, 5).data_ptr() == large.data_ptr()
    assert sum(buffer.numel() for buffer in workspace._buffers.values()) == 2 * TILE_ELEMENTS + 15 + 15  # none unasked
    assert not workspace.shrink()
    assert not workspace._buffers


def test_rows_of_the_cpu_are_not_copied_on_their_way() -> None:
    workspace, rows = Workspace(CPU), torch.ones(2, 2)
    with workspace.active():
        assert workspace.bring(rows) is rows
        assert workspace.fetch(rows) is rows


def test_reduced_precision_is_off_inside_and_as_before_outside() -> None:
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision, settings.allow_bf16_reduced_precision_reduction
    settings.fp32_precision = "tf32"
    try:
        with suppress(KeyError), full_precision():
            inside = settings.fp32_precision, settings.allow_bf16_reduced_precision_reduction
            raise KeyError
        assert inside == ("ieee", False)
        assert settings.fp32_precision == "tf32"
        assert settings.allow_bf16_reduced_precision_reduction == before[1]
    finally:
        settings.fp32_precision = before[0]


@pytest.mark.parametrize("n_workers", [1, 2])
def test_results_come_in_the_order_of_the_chunks_and_an_error_comes_through(tmp_path: Path, n_workers: int) -> None:
    tensors = {f"w{k}": torch.randn(40, 30) for k in range(6)} | {"n": torch.arange(9)}
    checkpoint = make_checkpoint(tmp_path / "base", tensors)
    plan = plan_merge(binding_of(checkpoint, {f"w{k}": low_rank(40, 30) for k in range(6)}), MergeOptions())
    parts = [part for tensor in plan.tensors for part in chunks(tensor, checkpoint, CPU, 100)]
    with local_workers(n_workers, 3, CPU) as workers:
        found = [(part.tensor.spec.name, part.start, view.nbytes) for part, view, _ in workers.evaluate(iter(parts))]
    assert found == [(part.tensor.spec.name, part.start, part.stop - part.start) for part in parts]

    def broken(_: Workspace) -> Any:
        raise MergeError("broken")

    parts[7] = Chunk(tensor=parts[7].tensor, start=parts[7].start, stop=parts[7].stop, compute=broken)
    with local_workers(n_workers, 3, CPU) as workers, pytest.raises(MergeError, match="broken"):
        list(workers.evaluate(iter(parts)))


def test_no_more_chunks_are_begun_than_may_wait(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "base", {"w": torch.randn(400, 30), "n": torch.arange(9)})
    plan = plan_merge(binding_of(checkpoint, {"w": low_rank(400, 30)}), MergeOptions())
    begun = 0

    def counted() -> Any:
        nonlocal begun
        for tensor in plan.tensors:
            for part in chunks(tensor, checkpoint, CPU, 60):
                begun += 1
                yield part

    with local_workers(2, 5, CPU) as workers:
        for n_done, _ in enumerate(workers.evaluate(counted())):
            assert begun <= n_done + 8


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "mps", "cpu:x", ""])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(MergeError, match="device"):
        chosen_device(name)


def test_auto_is_an_accelerator_where_there_is_one() -> None:
    assert chosen_device("cpu") == CPU
    assert chosen_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
