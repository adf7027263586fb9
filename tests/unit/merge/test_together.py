"""Several merges of one base side by side: each is what it is alone, and the base is read once."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_deploy.checkpoint import Checkpoint, open_checkpoint
from lora_deploy.errors import DiskSpaceError, LoraDeployError, MemoryBudgetError, NonFiniteTensorError
from lora_deploy.merge import execute as execution
from lora_deploy.merge.execute import Merged, execute
from lora_deploy.merge.options import MergeOptions
from lora_deploy.merge.output import partial_of
from lora_deploy.merge.plan import MergePlan, plan_merge
from lora_deploy.merge.together import Wanted, execute_together
from lora_deploy.safetensors_file import write_file
from tests.builders import make_checkpoint
from tests.merging import LLAMA, binding_of, digests, model_tensors, model_updates

SHARD_BYTES = 40_000
KEPT = ("*.safetensors", "config.json", "*.index.json")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    return make_checkpoint(tmp_path / "base", model_tensors(), LLAMA).root


def plan_of(base: Path, adapter: int, **options: Any) -> MergePlan:
    torch.manual_seed(adapter)
    binding = binding_of(open_checkpoint(base), model_updates(), sha256=f"{adapter:064}")
    defaults: dict[str, Any] = {"max_shard_bytes": SHARD_BYTES, "n_workers": 1, "device": "cpu"}
    return plan_merge(binding, MergeOptions(**(defaults | options)))


def wanted(base: Path, to: Path, *adapters: int, **options: Any) -> list[Wanted]:
    return [Wanted(plan=plan_of(base, k, **options), out=to / str(k)) for k in adapters]


def test_each_is_what_it_is_alone_in_any_dtype(base: Path, tmp_path: Path) -> None:
    together = [*wanted(base, tmp_path / "to", 1, 2), *wanted(base, tmp_path / "to", 3, dtype="float32")]
    assert len(together[2].plan.shards) > len(together[0].plan.shards) > 2
    for one, ended in zip(together, execute_together(together), strict=True):
        assert isinstance(ended.result, Merged)
        assert ended.result.record.cost.seconds == ended.seconds > 0
        alone = tmp_path / "alone" / one.out.name
        execute(one.plan, alone)
        assert digests(one.out, *KEPT) == digests(alone, *KEPT)
    assert {path.name for path in (tmp_path / "to").iterdir()} == {"1", "2", "3"}
    assert digests(together[0].out, *KEPT) != digests(together[1].out, *KEPT)

    again = execute_together(together)
    assert all(isinstance(ended.result, Merged) and ended.result.was_done for ended in again)


def test_a_part_of_the_base_is_read_for_all_before_the_next_is_read(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[str, int]] = []
    fetch = Checkpoint.fetch

    def recorded(self: Checkpoint, name: str, start: int, stop: int) -> None:
        read.append((name, id(self)))
        fetch(self, name, start, stop)

    monkeypatch.setattr(Checkpoint, "fetch", recorded)
    together = [*wanted(base, tmp_path / "to", 1, 2, 3), *wanted(base, tmp_path / "to", 4, dtype="float32")]
    shard_of = {tensor.spec.name: shard.file for shard in together[0].plan.shards for tensor in shard.tensors}
    same, wider = together[:3], together[3]
    execute_together(together)
    order = [shard_of[name] for name, reader in read if reader != id(wider.plan.binding.checkpoint)]
    assert [file for file, _ in groupby(order)] == [shard.file for shard in same[0].plan.shards], "each part once"
    assert len({reader for _, reader in read}) == 4

    where = list(shard_of)
    most = max(len(shard.tensors) for shard in same[0].plan.shards)
    ahead = 0
    for name, reader in read:
        if reader != id(wider.plan.binding.checkpoint):
            ahead = where.index(name)
        else:
            assert abs(where.index(name) - ahead) <= most, "what fills more files keeps step with the others"


def test_one_that_fails_does_not_stop_the_others(base: Path, tmp_path: Path) -> None:
    together = wanted(base, tmp_path / "to", 1, 2, 3)
    broken = next(iter(together[1].plan.shards[2].tensors)).updates[0].update
    broken.up[0, 0] = float("nan")  # type: ignore[union-attr] # a low-rank update
    (tmp_path / "to" / "3").mkdir(parents=True)
    (tmp_path / "to" / "3" / "mine").touch()
    first, second, third = execute_together(together)
    assert isinstance(first.result, Merged)
    assert isinstance(second.result, NonFiniteTensorError)
    assert isinstance(third.result, LoraDeployError)
    assert "is no merge of ours" in third.result.message
    execute(together[0].plan, tmp_path / "alone")
    assert digests(tmp_path / "to" / "1", *KEPT) == digests(tmp_path / "alone", *KEPT)
    assert not (tmp_path / "to" / "2").exists()
    assert len(list(partial_of(tmp_path / "to" / "2").glob("*.safetensors"))) == 2, "what was written is gone on with"


def test_a_disk_that_fills_up_is_the_error_of_the_merge_that_met_it(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *rest: Any, **names: Any) -> Any:
        if path.name == "config.json" and path.parent.name == "2.partial":
            raise OSError(28, "No space left on device")
        return write_file(path, *rest, **names)

    monkeypatch.setattr(execution, "write_file", full)
    first, second = execute_together(wanted(base, tmp_path / "to", 1, 2))
    assert isinstance(first.result, Merged)
    assert isinstance(second.result, DiskSpaceError)


def test_what_does_not_fit_beside_the_others_is_merged_after_them(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = wanted(base, tmp_path / "to", 1, 2, 3)
    fit, opened = execution.fit, []

    def tight(plan: MergePlan) -> Any:
        if plan is together[1].plan and not (tmp_path / "to" / "3").exists():
            raise MemoryBudgetError("too much beside another")
        opened.append(plan)
        return fit(plan)

    monkeypatch.setattr(execution, "fit", tight)
    assert all(isinstance(ended.result, Merged) for ended in execute_together(together))
    assert opened == [together[0].plan, together[2].plan, together[1].plan]


def never() -> Any:
    raise MemoryBudgetError("never fits")


def test_what_never_fits_is_its_own_error(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = wanted(base, tmp_path / "to", 1, 2)
    fit = execution.fit
    monkeypatch.setattr(execution, "fit", lambda plan: never() if plan is together[1].plan else fit(plan))
    first, second = execute_together(together)
    assert isinstance(first.result, Merged)
    assert isinstance(second.result, MemoryBudgetError)
