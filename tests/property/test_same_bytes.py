"""Law 2: the merged files are the same bytes, however the work is cut, shared out, budgeted or interrupted."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lora_deploy.checkpoint import open_checkpoint
from lora_deploy.merge.execute import execute
from lora_deploy.merge.options import MergeOptions
from lora_deploy.merge.plan import MergePlan, plan_merge
from tests.builders import make_checkpoint
from tests.merging import LLAMA, binding_of, digests, every_kind

EXACT, SHARD, EXECUTE, BUDGET, WORKSPACE = (
    importlib.import_module(f"lora_deploy.merge.{name}")
    for name in ("exact", "shard", "execute", "budget", "workspace")
)
DTYPES = ["float16", "bfloat16", "float32"]


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., MergePlan]:
    torch.manual_seed(11)
    folder = tmp_path_factory.mktemp("base")
    tensors, updates = every_kind()
    make_checkpoint(folder, tensors, LLAMA)

    def plan(**options: Any) -> MergePlan:
        defaults = {"device": "cpu", "max_shard_bytes": 1_500_000, "n_workers": 2}
        binding = binding_of(open_checkpoint(folder), updates)
        return plan_merge(binding, MergeOptions(**(defaults | options)))

    return plan


@pytest.fixture(scope="module")
def expected(planned: Callable[..., MergePlan], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Digests of the files by dtype, from one worker."""
    place = tmp_path_factory.mktemp("expected")
    return {
        dtype: digests(execute(planned(dtype=dtype, n_workers=1), place / dtype).root, "*.safetensors")
        for dtype in DTYPES
    }


def merged(plan: MergePlan, out: Path) -> dict[str, str]:
    return digests(execute(plan, out).root, "*.safetensors")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_workers", [2, 4])
def test_any_number_of_workers_gives_the_same_bytes(
    planned: Any, expected: dict[str, dict[str, str]], tmp_path: Path, n_workers: int, dtype: str
) -> None:
    assert merged(planned(dtype=dtype, n_workers=n_workers), tmp_path / "out") == expected[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("elements", "cols"), [(1 << 12, 64), (1000, 4096), (1 << 20, 333)])
def test_any_tile_gives_the_same_bytes(
    planned: Any,
    expected: dict[str, dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    elements: int,
    cols: int,
    dtype: str,
) -> None:
    monkeypatch.setattr(WORKSPACE, "TILE_ELEMENTS", elements)
    monkeypatch.setattr(EXACT, "TILE_COLS", cols)
    assert merged(planned(dtype=dtype), tmp_path / "out") == expected[dtype]


@pytest.mark.parametrize(("few", "dtype"), [*((0, dtype) for dtype in DTYPES), (10**9, "float16"), (10**9, "bfloat16")])
def test_any_way_to_settle_what_is_open_gives_the_same_bytes(
    planned: Any,
    expected: dict[str, dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    few: int,
    dtype: str,
) -> None:
    monkeypatch.setattr(EXACT, "_FEW", few)
    monkeypatch.setattr(EXACT, "_GATHERED", 500)
    assert merged(planned(dtype=dtype), tmp_path / "out") == expected[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_memory_budget_and_chunk_gives_the_same_bytes(
    planned: Any, expected: dict[str, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setattr(BUDGET, "private_bytes", lambda: 100_000_000)
    roomy = BUDGET.fit(planned(dtype=dtype, memory_bytes=4_000_000_000))
    assert (roomy.n_workers, roomy.chunk_elements) == (2, SHARD.CHUNK_ELEMENTS)
    tight = planned(dtype=dtype, memory_bytes=roomy.peak_bytes - 1)
    assert BUDGET.fit(tight).chunk_elements < SHARD.CHUNK_ELEMENTS
    assert merged(tight, tmp_path / "tight") == expected[dtype]
    for chunk_elements in (777, 1 << 22):
        footprint = replace(roomy, chunk_elements=chunk_elements, n_ahead=1)
        monkeypatch.setattr(EXECUTE, "fit", lambda _, chosen=footprint: chosen)
        assert merged(planned(dtype=dtype), tmp_path / str(chunk_elements)) == expected[dtype]


@pytest.mark.parametrize("n_shards", [0, 2])
def test_interrupted_and_resumed_with_other_workers_gives_the_same_bytes(
    planned: Any, expected: dict[str, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_shards: int
) -> None:
    real, calls = EXECUTE._merge_shard, []

    def merging(*arguments: Any) -> Any:
        if len(calls) == n_shards:
            raise KeyboardInterrupt
        calls.append(arguments)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(EXECUTE, "_merge_shard", merging)
        with pytest.raises(KeyboardInterrupt):
            execute(planned(dtype="float16", n_workers=4), tmp_path / "out")
    assert merged(planned(dtype="float16", n_workers=1), tmp_path / "out") == expected["float16"]


def test_any_number_of_torch_threads_around_it_gives_the_same_bytes(
    planned: Any, expected: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    torch.set_num_threads(2)
    try:
        assert merged(planned(dtype="float16"), tmp_path / "out") == expected["float16"]
        with ThreadPoolExecutor(1) as new_thread:
            assert new_thread.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_shard_size_gives_the_same_tensors(planned: Any, tmp_path: Path, dtype: str) -> None:
    found: list[dict[str, Tensor]] = []
    for k, max_shard_bytes in enumerate([10, 700_000, 10**9]):
        out = execute(planned(dtype=dtype, max_shard_bytes=max_shard_bytes), tmp_path / str(k)).root
        tensors: dict[str, Tensor] = {}
        for path in out.glob("*.safetensors"):
            tensors |= load_file(path)
        found.append(tensors)
    for tensors in found[1:]:
        assert tensors.keys() == found[0].keys()
        assert all(torch.equal(tensors[name].view(torch.uint8), found[0][name].view(torch.uint8)) for name in tensors)


def test_the_block_of_a_kind_defined_in_float64_does_not_depend_on_the_chunk(planned: Any) -> None:
    plan = planned()
    dora = next(tensor for tensor in plan.tensors if tensor.spec.name == "dora")
    cuts = {
        tuple(
            (chunk.start, chunk.stop) for chunk in SHARD.chunks(dora, plan.binding.checkpoint, torch.device("cpu"), n)
        )
        for n in (100, 1 << 17, 1 << 22)
    }
    assert len(cuts) == 1
