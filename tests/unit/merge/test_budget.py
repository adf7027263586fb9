"""Law 5: the plan states the memory, the work stays below it, and what does not fit is refused before any write."""

from __future__ import annotations

import importlib
import json
import mmap
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_deploy.errors import MemoryBudgetError
from lora_deploy.merge.budget import estimate, fit, free_disk_bytes, private_bytes, require_disk
from lora_deploy.merge.execute import execute
from lora_deploy.merge.options import MergeOptions
from lora_deploy.merge.plan import MergePlan, plan_merge
from lora_deploy.updates.dora import Dora
from lora_deploy.updates.low_rank import LowRank
from lora_deploy.updates.residual import Residual
from lora_deploy.updates.scaled_product import ScaledProduct
from tests.builders import low_rank, make_checkpoint, make_scale
from tests.merging import binding_of, digests, model_plan

BUDGET = importlib.import_module("lora_deploy.merge.budget")

MEASURED = """
import json, sys, threading
from pathlib import Path
import torch
from lora_deploy.checkpoint import open_checkpoint
from lora_deploy.merge import compiled
from lora_deploy.merge.budget import fit, private_bytes
from lora_deploy.merge.execute import execute
from lora_deploy.merge.options import MergeOptions
from lora_deploy.merge.plan import plan_merge
from tests.builders import low_rank
from tests.merging import binding_of

torch.manual_seed(0)
base, out, options = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
compiled.PAYS_FROM_ELEMENTS = options.pop("pays_from", compiled.PAYS_FROM_ELEMENTS)
checkpoint = open_checkpoint(base)
matrices = [spec for spec in checkpoint.tensors.values() if "norm" not in spec.name]
update = low_rank(*matrices[0].shape, rank=16, scale=0.01)
plan = plan_merge(binding_of(checkpoint, {spec.name: update for spec in matrices}), MergeOptions(**options))
peak, is_over = [0], threading.Event()

def watch():
    while not is_over.wait(0.002):
        peak[0] = max(peak[0], private_bytes())

watcher = threading.Thread(target=watch)
watcher.start()
done = execute(plan, out)
is_over.set()
watcher.join()
cost = done.record.cost
print(json.dumps([peak[0], cost.planned_peak_bytes, cost.peak_private_bytes]))
"""


def write_base(folder: Path, n_matrices: int) -> None:
    matrix = (torch.randn(2048, 2048) * 0.02).to(torch.bfloat16)
    make_checkpoint(folder, {f"layers.{k}.weight": matrix for k in range(n_matrices)} | {"norm": torch.ones(64)})


def measured(base: Path, out: Path, **options: Any) -> tuple[int, int, int]:
    """Merge in a process of its own: its greatest private memory, what was planned, and what the record says."""
    environment = os.environ | {"PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"}
    defaults = {"device": "cpu", "n_workers": 2, "dtype": "base", "pays_from": 10**12}
    command = [sys.executable, "-c", MEASURED, str(base), str(out), json.dumps(defaults | options)]
    run = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return tuple(json.loads(run.stdout))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_base(folder, 24)
    return folder


@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": "float16", "n_workers": 4}, {"dtype": "float32", "n_workers": 1}, {"pays_from": 0}],
    ids=str,
)
def test_a_merge_of_200_mb_stays_below_the_memory_that_was_planned(
    base: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    measured(base, tmp_path / "first", **options)  # which also compiles what is compiled once
    peak, planned, recorded = measured(base, tmp_path / "out", **options)
    assert recorded <= peak * 1.02
    assert peak <= planned
    assert planned <= 2.5 * peak, "a bound that says nothing"


def test_a_small_budget_is_kept(base: Path, tmp_path: Path) -> None:
    _, planned, _ = measured(base, tmp_path / "roomy")
    allowed = planned - 40_000_000
    peak, planned_tightly, _ = measured(base, tmp_path / "tight", memory_bytes=allowed)
    assert peak <= planned_tightly <= allowed
    assert digests(tmp_path / "tight", "*.safetensors") == digests(tmp_path / "roomy", "*.safetensors")


def test_twice_as_large_a_model_of_the_same_shapes_takes_the_same_memory(base: Path, tmp_path: Path) -> None:
    write_base(tmp_path / "double", 48)
    small, planned_small, _ = measured(base, tmp_path / "small-out")
    large, planned_large, _ = measured(tmp_path / "double", tmp_path / "large-out")
    assert planned_large == pytest.approx(planned_small, rel=0.02)
    assert large == pytest.approx(small, rel=0.1)


def test_too_small_a_budget_is_refused_before_any_write_with_what_is_needed(tmp_path: Path) -> None:
    plan = model_plan(tmp_path, memory_bytes=50_000_000)
    with pytest.raises(MemoryBudgetError, match="--memory allows 50,000,000") as caught:
        execute(plan, tmp_path / "to" / "out")
    assert not (tmp_path / "to").exists()
    suggested = int(float(str(caught.value.hint).removeprefix("--memory ").removesuffix("GB")) * 1e9)
    execute(model_plan(tmp_path, memory_bytes=suggested), tmp_path / "to" / "out")


def test_more_than_the_machine_has_free_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BUDGET, "available_bytes", lambda: 1_000_000)
    with pytest.raises(MemoryBudgetError, match="the machine has 1,000,000 free"):
        fit(model_plan(tmp_path))


def planned_peak(folder: Path, shape: tuple[int, int], update: Any, **options: Any) -> int:
    checkpoint = make_checkpoint(folder, {"w": torch.zeros(shape, dtype=torch.bfloat16)})
    defaults = {"device": "cpu", "n_workers": 2, "memory_bytes": 10**12}
    plan: MergePlan = plan_merge(binding_of(checkpoint, {"w": update}), MergeOptions(**(defaults | options)))
    return fit(plan).peak_bytes - private_bytes()


def test_the_plan_grows_with_factors_workers_and_what_a_factorisation_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BUDGET, "available_bytes", lambda: None)
    monkeypatch.setattr(BUDGET, "private_bytes", lambda: 0)
    monkeypatch.setattr(sys.modules[__name__], "private_bytes", lambda: 0)
    shape = (2000, 1000)
    small = planned_peak(tmp_path / "a", shape, low_rank(*shape, rank=4))
    assert planned_peak(tmp_path / "b", shape, low_rank(*shape, rank=512)) >= small + 8 * 3000 * 508
    assert planned_peak(tmp_path / "c", shape, low_rank(*shape, rank=4), n_workers=8) > small + 100_000_000
    dora = Dora(inner=low_rank(*shape, rank=4), magnitude=torch.ones(2000), axis="rows")
    assert planned_peak(tmp_path / "d", shape, dora) > small
    whole = Residual(low_rank=low_rank(*shape, rank=4), method="pissa")
    assert planned_peak(tmp_path / "e", shape, whole) >= planned_peak(tmp_path / "f", shape, dora) + 8 * 2_000_000
    product = ScaledProduct(
        up=torch.ones(2000, 512), down=torch.ones(512, 1000), inner=torch.ones(512), scale=make_scale(1)
    )
    assert planned_peak(tmp_path / "g", shape, product) >= planned_peak(tmp_path / "f", shape, dora) + 8 * 512_000


def test_a_high_rank_takes_no_more_than_planned_where_everything_is_open(tmp_path: Path) -> None:
    """Every element is a tie: the finer levels gather factors for each."""
    up = torch.full((64, 512), 2.0**-17)
    update = LowRank(up=up, down=torch.ones(512, 256), scale=low_rank(1, 1, scale=1).scale)
    checkpoint = make_checkpoint(tmp_path / "base", {"w": torch.ones(64, 256, dtype=torch.bfloat16)})
    options = MergeOptions(device="cpu", n_workers=1, dtype="bfloat16")
    plan = plan_merge(binding_of(checkpoint, {"w": update}), options)
    peak, is_over = [0], threading.Event()

    def watch() -> None:
        while not is_over.wait(0.001):
            peak[0] = max(peak[0], private_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    before = private_bytes()
    cost = execute(plan, tmp_path / "out").record.cost
    is_over.set()
    watcher.join()
    assert peak[0] <= cost.planned_peak_bytes
    assert peak[0] - before < 64_000_000


def test_an_estimate_states_bytes_memory_disk_and_time(tmp_path: Path) -> None:
    plan = model_plan(tmp_path)
    stated = estimate(plan, tmp_path / "not" / "yet" / "there")
    assert stated.n_output_bytes == sum(len(shard.header) for shard in plan.shards) + sum(
        tensor.spec.n_bytes for tensor in plan.tensors
    )
    assert stated.peak_bytes == pytest.approx(fit(plan).peak_bytes, rel=0.05)
    assert stated.free_disk_bytes == pytest.approx(free_disk_bytes(tmp_path), rel=0.05)
    assert 0 < stated.seconds < 1


def test_private_memory_grows_with_what_the_process_holds() -> None:
    before = private_bytes()
    held = mmap.mmap(-1, 50_000_000, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # new, not what others have freed
    held.write(bytes(50_000_000))
    assert 45e6 < private_bytes() - before < 60e6
    del held


def test_free_disk_is_asked_of_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    require_disk(tmp_path / "a" / "b", 1)
    require_disk(tmp_path, -5)
