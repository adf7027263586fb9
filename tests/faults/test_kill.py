"""Law 6: kill the merge anywhere; the same command gives the same files, leaves none behind, and loses nothing."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from lora_deploy.merge.record import read_record
from tests.faults.dying import DONE, INTERRUPTED, REFUSED, Run
from tests.merging import digests, model_plan

SHARD_BYTES = 40_000
KEPT = ("*.safetensors", "config.json", "*.index.json")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], int]:
    """The files of a merge that nobody disturbed, and how often it changed the file system."""
    here = tmp_path_factory.mktemp("whole")
    run = Run(here, place_of(here))
    assert run.wait() == DONE
    return digests(here / "to" / "out", *KEPT), run.n_changes.value


def place_of(here: Path) -> Path:
    """Make a folder for the output alone, and the base beside it, before any process needs it."""
    model_plan(here)
    (here / "to").mkdir()
    return here / "to" / "out"


def assert_nothing_else(out: Path, expected: dict[str, str]) -> None:
    assert digests(out, *KEPT) == expected
    assert {path.name for path in out.parent.iterdir()} == {out.name}
    assert set(digests(out)) == {*expected, "merge.json"}
    recorded = {file.path: file.sha256 for file in read_record(out).artifacts}
    assert recorded == expected


def test_a_merge_changes_the_file_system_often_enough_for_the_tests_below(whole: tuple[dict[str, str], int]) -> None:
    expected, n_changes = whole
    assert len(expected) >= 6
    assert n_changes > 80


@pytest.mark.parametrize("share", range(40))
def test_killed_before_any_change_of_the_file_system_the_same_command_finishes(
    share: int, whole: tuple[dict[str, str], int], tmp_path: Path
) -> None:
    """Forty points, evenly from the first change to the last but a few; writes are torn in the middle."""
    expected, n_changes = whole
    out = place_of(tmp_path)
    die_at = 1 + share * (n_changes - 1) // 39
    killed = Run(tmp_path, out, die_at=die_at, tear=True)
    assert killed.wait() == -signal.SIGKILL
    resumed = Run(tmp_path, out)
    assert resumed.wait() == DONE
    assert_nothing_else(out, expected)
    n_bytes = model_plan(tmp_path).n_bytes
    assert killed.n_merged_bytes.value + resumed.n_merged_bytes.value <= n_bytes + SHARD_BYTES


@pytest.mark.parametrize("seed", range(6))
def test_killed_at_a_random_moment_again_and_again_it_still_ends_well(
    seed: int, whole: tuple[dict[str, str], int], tmp_path: Path
) -> None:
    expected, n_changes = whole
    out = place_of(tmp_path)
    chosen = random.Random(seed)
    for _ in range(3):
        run = Run(tmp_path, out, die_at=chosen.randrange(5, n_changes), tear=True)
        assert run.wait() in {DONE, -signal.SIGKILL}
    assert Run(tmp_path, out).wait() == DONE
    assert_nothing_else(out, expected)


@pytest.fixture(scope="module")
def replaced(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], int]:
    """The files of another merge that took the place of the first, and how often it changed the file system."""
    here = tmp_path_factory.mktemp("replaced")
    out = place_of(here)
    assert Run(here, out).wait() == DONE
    run = Run(here, out, dtype="bfloat16", fresh=True)
    assert run.wait() == DONE
    expected = digests(out, *KEPT)
    assert_nothing_else(out, expected)
    return expected, run.n_changes.value


@pytest.mark.parametrize("before_last", [*range(14), 20, 30, 50, 70])
def test_killed_while_it_replaces_another_merge_one_of_the_two_is_whole(
    before_last: int, whole: tuple[dict[str, str], int], replaced: tuple[dict[str, str], int], tmp_path: Path
) -> None:
    (old, _), (new, n_changes) = whole, replaced
    out = place_of(tmp_path)
    assert Run(tmp_path, out).wait() == DONE
    options = {"dtype": "bfloat16", "fresh": True}
    assert Run(tmp_path, out, die_at=n_changes - before_last, **options).wait() == -signal.SIGKILL
    holders = [folder for folder in out.parent.iterdir() if digests(folder, *KEPT) in (old, new)]
    assert holders, "neither the old merge nor the new one is whole"
    assert out.exists() or digests(out.parent / ".out.lora-deploy-replaced", *KEPT) == old
    assert Run(tmp_path, out, **options).wait() == DONE
    assert_nothing_else(out, new)


def test_the_old_merge_comes_back_when_its_replacement_never_came(
    whole: tuple[dict[str, str], int], tmp_path: Path
) -> None:
    """Killed between the two renames; then the new merge is given up, and the old command is given again."""
    old, _ = whole
    out = place_of(tmp_path)
    assert Run(tmp_path, out).wait() == DONE
    out.rename(out.parent / ".out.lora-deploy-replaced")
    again = Run(tmp_path, out)
    assert again.wait() == DONE
    assert again.n_merged_bytes.value == 0
    assert_nothing_else(out, old)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_stopped_by_a_signal_in_the_middle_it_resumes(
    number: signal.Signals, whole: tuple[dict[str, str], int], tmp_path: Path
) -> None:
    expected, _ = whole
    out = place_of(tmp_path)
    run = Run(tmp_path, out, pause_s=0.02)
    while not list(tmp_path.glob("to/out.partial/*.safetensors")):
        time.sleep(0.005)
    assert run.kill(number) == (INTERRUPTED if number is signal.SIGINT else -signal.SIGKILL)
    assert not out.exists()
    if number is signal.SIGINT:  # it had time to tidy up: what remains is whole shards and their records
        names = {path.name for path in (out.parent / "out.partial").iterdir()} - {".work"}
        assert names <= set(expected)
        records = {path.name for path in (out.parent / "out.partial/.work").iterdir()}
        assert len({f"{name}.json" for name in names} - records) <= 1  # the signal may come between file and record
    assert Run(tmp_path, out).wait() == DONE
    assert_nothing_else(out, expected)


def test_a_second_process_is_told_to_wait_and_harms_nothing(whole: tuple[dict[str, str], int], tmp_path: Path) -> None:
    expected, _ = whole
    out = place_of(tmp_path)
    first = Run(tmp_path, out, pause_s=0.02)
    while not first.n_merged_bytes.value:
        time.sleep(0.005)
    second = Run(tmp_path, out)
    assert second.wait() == REFUSED
    assert first.wait() == DONE
    assert_nothing_else(out, expected)


def test_many_processes_at_once_make_one_merge(whole: tuple[dict[str, str], int], tmp_path: Path) -> None:
    expected, _ = whole
    out = place_of(tmp_path)
    runs = [Run(tmp_path, out) for _ in range(4)]
    codes = [run.wait() for run in runs]
    assert DONE in codes
    assert set(codes) <= {DONE, REFUSED}
    assert Run(tmp_path, out).wait() == DONE
    assert_nothing_else(out, expected)
