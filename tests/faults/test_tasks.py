"""A merge in tasks: any of them may die, run twice at once or write late, and the result is that of one process."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from lora_deploy.errors import MergeError, OutputExistsError, RecipeError
from lora_deploy.merge.execute import execute
from lora_deploy.merge.output import WORK_FOLDER, partial_of
from lora_deploy.merge.tasks import Task, carry_out_task, finalize
from tests.faults.dying import DONE, Run
from tests.merging import digests, model_plan

SHARD_BYTES = 40_000
KEPT = ("*.safetensors", "config.json", "*.index.json")
N_TASKS = 4


def of(index: int, count: int = N_TASKS) -> Task:
    return Task(index=index, count=count)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    model_plan(tmp_path, max_shard_bytes=SHARD_BYTES)
    (tmp_path / "to").mkdir()
    return tmp_path


def whole(here: Path) -> dict[str, str]:
    execute(model_plan(here, max_shard_bytes=SHARD_BYTES), here / "alone")
    return digests(here / "alone", *KEPT)


def test_tasks_in_any_order_make_the_files_of_one_process(here: Path) -> None:
    plan, out = model_plan(here, max_shard_bytes=SHARD_BYTES), here / "to" / "out"
    assert len(plan.shards) > N_TASKS
    done = [carry_out_task(plan, out, of(index)) for index in (2, 0, 3, 1)]
    assert sorted(file for task in done for file in task.files) == sorted(shard.file for shard in plan.shards)
    assert not out.exists()
    merged = finalize(plan, out)
    assert digests(out, *KEPT) == whole(here)
    assert {path.name for path in out.parent.iterdir()} == {"out"}
    assert set(digests(out)) == {*digests(out, *KEPT), "merge.json"}
    assert merged.record.cost.seconds > 0
    assert finalize(plan, out).was_done
    assert carry_out_task(plan, out, of(1)).is_merged
    assert execute(plan, out).was_done


def test_tasks_that_are_killed_at_random_are_made_up_for_by_others(here: Path) -> None:
    """Eight processes for four tasks, each task twice at once, shot at random; then whoever is missing runs again."""
    out, draw = here / "to" / "out", random.Random(5)
    options = {"max_shard_bytes": SHARD_BYTES, "pause_s": 0.05}
    runs = [Run(here, out, task=(k % N_TASKS, N_TASKS), **options) for k in range(2 * N_TASKS)]
    for run in draw.sample(runs, 5):
        while run.process.is_alive() and not run.n_merged_bytes.value:
            time.sleep(0.001)
        run.kill(signal.SIGKILL)
    codes = [run.wait() for run in runs]
    assert set(codes) == {DONE, -signal.SIGKILL}
    plan = model_plan(here, max_shard_bytes=SHARD_BYTES)
    for index in range(N_TASKS):
        assert Run(here, out, task=(index, N_TASKS), max_shard_bytes=SHARD_BYTES).wait() == DONE
    finalize(plan, out)
    assert digests(out, *KEPT) == whole(here)
    assert set(digests(out)) == {*digests(out, *KEPT), "merge.json"}


def test_what_is_missing_is_named_and_nothing_is_put_in_place(here: Path) -> None:
    plan, out = model_plan(here, max_shard_bytes=SHARD_BYTES), here / "to" / "out"
    with pytest.raises(MergeError, match=rf"{len(plan.shards)} of {len(plan.shards)} weight files are missing"):
        finalize(plan, out)
    assert not partial_of(out).exists()
    for index in range(N_TASKS - 1):
        carry_out_task(plan, out, of(index))
    with pytest.raises(MergeError) as caught:
        finalize(plan, out)
    assert caught.value.code == "shards-missing"
    assert of(N_TASKS - 1).share(plan)[0].file in caught.value.message
    assert not out.exists()
    carry_out_task(plan, out, of(N_TASKS - 1))
    damaged = partial_of(out) / plan.shards[0].file
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    with pytest.raises(MergeError, match=r"1 of .* missing or damaged"):
        finalize(plan, out)
    carry_out_task(plan, out, of(0))
    finalize(plan, out)
    assert digests(out, *KEPT) == whole(here)


def test_a_task_that_is_still_at_work_is_waited_for(here: Path) -> None:
    plan, out = model_plan(here, max_shard_bytes=SHARD_BYTES), here / "to" / "out"
    running = Run(here, out, task=(0, N_TASKS), max_shard_bytes=SHARD_BYTES, pause_s=0.05)
    while not (partial_of(out) / WORK_FOLDER / "plan.json").exists():
        time.sleep(0.01)
    with pytest.raises(OutputExistsError, match="another process is at work there"):
        finalize(plan, out)
    with pytest.raises(OutputExistsError, match="another process is at work there"):
        execute(plan, out)
    running.kill()


def test_other_options_are_another_merge(here: Path) -> None:
    plan, out = model_plan(here, max_shard_bytes=SHARD_BYTES), here / "to" / "out"
    other = model_plan(here, max_shard_bytes=SHARD_BYTES, dtype="float32")
    carry_out_task(plan, out, of(0))
    for work in (lambda: carry_out_task(other, out, of(1)), lambda: finalize(other, out)):
        with pytest.raises(OutputExistsError, match="differs in"):
            work()


def test_files_of_nobodys_are_not_joined(here: Path) -> None:
    plan, out = model_plan(here, max_shard_bytes=SHARD_BYTES), here / "to" / "out"
    (partial_of(out) / WORK_FOLDER).mkdir(parents=True)
    (partial_of(out) / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputExistsError, match=r"holds thesis\.txt, of no merge of ours"):
        carry_out_task(plan, out, of(0))


@pytest.mark.parametrize(("index", "count"), [(-1, 2), (2, 2), (0, 0)])
def test_an_index_outside_is_refused(index: int, count: int) -> None:
    with pytest.raises(RecipeError, match=f"task {index} of {count}"):
        of(index, count)
