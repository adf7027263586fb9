"""What is in the way of a merge, or goes wrong beneath it: one clear error, and nothing that is not ours is touched."""

from __future__ import annotations

import errno
import fcntl
import importlib
import json
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_deploy.errors import DiskSpaceError, InputError, MergeError, NonFiniteTensorError, OutputExistsError
from lora_deploy.merge.execute import Merged, execute
from lora_deploy.merge.options import MergeOptions
from lora_deploy.merge.output import locked
from lora_deploy.merge.plan import MergePlan, plan_merge
from tests.builders import low_rank, make_checkpoint
from tests.merging import binding_of, digests, model_plan

EXECUTE = importlib.import_module("lora_deploy.merge.execute")
SHARD = "model-00002-of-00005.safetensors"


class StoppedError(Exception):
    """The test stops a merge here."""


def stop_before(monkeypatch: pytest.MonkeyPatch, n_shards: int) -> None:
    """Let a merge end after so many shards."""
    real, calls = EXECUTE._merge_shard, []

    def merging(*arguments: Any) -> Any:
        if len(calls) == n_shards:
            raise StoppedError
        calls.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(EXECUTE, "_merge_shard", merging)


def unfinished(plan: MergePlan, out: Path, n_shards: int = 3) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        stop_before(patch, n_shards)
        with pytest.raises(StoppedError):
            execute(plan, out)
    return out.with_name(out.name + ".partial")


def merged_shards(plan: MergePlan, out: Path) -> list[str]:
    """Merge, and give the shards that had to be computed."""
    with pytest.MonkeyPatch.context() as patch:
        real, files = EXECUTE._merge_shard, []

        def merging(plan: MergePlan, shard: Any, *rest: Any) -> Any:
            files.append(shard.file)
            return real(plan, shard, *rest)

        patch.setattr(EXECUTE, "_merge_shard", merging)
        execute(plan, out)
    return files


@pytest.fixture
def plan(tmp_path: Path) -> MergePlan:
    return model_plan(tmp_path)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "to").mkdir()
    return tmp_path / "to" / "out"


def test_a_finished_merge_is_a_success_at_once(plan: MergePlan, out: Path) -> None:
    assert not execute(plan, out).was_done
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert execute(plan, out).was_done
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_finished_shards_are_not_computed_again(plan: MergePlan, out: Path) -> None:
    unfinished(plan, out, 3)
    assert merged_shards(plan, out) == [shard.file for shard in plan.shards[3:]]


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "record", "other"])
def test_a_damaged_shard_of_an_unfinished_merge_is_computed_again(plan: MergePlan, out: Path, damage: str) -> None:
    partial = unfinished(plan, out, 3)
    path, record = partial / SHARD, partial / ".work" / f"{SHARD}.json"
    if damage == "truncate":
        os.truncate(path, path.stat().st_size - 1)
    elif damage == "flip":
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        stamp = path.stat()
        path.write_bytes(content)
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    elif damage == "remove":
        path.unlink()
    elif damage == "record":
        record.write_text(record.read_text()[:-20])
    else:
        record.write_text(json.dumps(json.loads(record.read_text()) | {"plan": "0" * 64}))
    assert merged_shards(plan, out) == [SHARD, *(shard.file for shard in plan.shards[3:])]
    assert digests(out, "*.safetensors") == digests(execute(plan, out.with_name("whole")).root, "*.safetensors")


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_finished_merge_that_changed_since_is_named_and_replaced_only_when_asked(
    plan: MergePlan, out: Path, tmp_path: Path, damage: str
) -> None:
    expected = digests(execute(plan, out).root, "*.safetensors")
    if damage == "truncate":
        os.truncate(out / SHARD, 100)
    elif damage == "flip":
        (out / SHARD).write_bytes(b"x" + (out / SHARD).read_bytes()[1:])
    else:
        (out / SHARD).unlink()
    before = digests(out)
    with pytest.raises(OutputExistsError, match=rf"holds this merge, but {SHARD} was changed or lost since"):
        execute(plan, out)
    assert digests(out) == before
    execute(model_plan(tmp_path, fresh=True), out)
    assert digests(out, "*.safetensors") == expected


def test_another_merge_is_replaced_only_when_asked(plan: MergePlan, out: Path, tmp_path: Path) -> None:
    before = digests(execute(plan, out).root)
    with pytest.raises(OutputExistsError, match="holds another merge") as caught:
        execute(model_plan(tmp_path, dtype="bfloat16"), out)
    assert "--fresh" in str(caught.value.hint)
    assert digests(out) == before
    execute(model_plan(tmp_path, dtype="bfloat16", fresh=True), out)
    assert digests(out, "*.safetensors") == digests(
        execute(model_plan(tmp_path, dtype="bfloat16"), out.with_name("whole")).root, "*.safetensors"
    )
    assert {path.name for path in out.parent.iterdir()} == {"out", "whole"}


def test_a_replacement_that_fails_leaves_the_old_merge_as_it_was(plan: MergePlan, out: Path, tmp_path: Path) -> None:
    before = digests(execute(plan, out).root)
    unfinished(model_plan(tmp_path, dtype="float32", fresh=True), out)
    assert digests(out) == before


def test_an_unfinished_other_merge_is_named_by_what_differs(plan: MergePlan, out: Path, tmp_path: Path) -> None:
    partial = unfinished(plan, out)
    before = digests(partial)
    with pytest.raises(OutputExistsError, match=r"holds an unfinished merge that differs in merge options, config"):
        execute(model_plan(tmp_path, dtype="bfloat16"), out)
    with pytest.raises(OutputExistsError, match=r"differs in base, adapters"):
        execute(model_plan(tmp_path, seed=1), out)
    assert digests(partial) == before
    execute(model_plan(tmp_path, dtype="bfloat16", fresh=True), out)
    assert {path.name for path in out.parent.iterdir()} == {"out"}


def test_memory_workers_and_device_do_not_make_it_another_merge(plan: MergePlan, out: Path, tmp_path: Path) -> None:
    unfinished(plan, out, 4)
    other = model_plan(tmp_path, n_workers=1, memory_bytes=1_900_000_000, device="auto")
    assert merged_shards(other, out) == [plan.shards[4].file]


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("content", ["folder", "file", "link to a file"])
def test_what_is_no_merge_of_ours_is_never_touched(out: Path, tmp_path: Path, content: str, fresh: bool) -> None:
    if content == "folder":
        out.mkdir()
        (out / "thesis.txt").write_text("two years of work")
    elif content == "file":
        out.write_text("two years of work")
    else:
        (tmp_path / "thesis.txt").write_text("two years of work")
        out.symlink_to(tmp_path / "thesis.txt")
    before = digests(out.parent)
    with pytest.raises(OutputExistsError, match="exists and is no merge of ours"):
        execute(model_plan(tmp_path, fresh=fresh), out)
    assert digests(out.parent) == before
    assert {path.name for path in out.parent.iterdir()} == {"out"}


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("content", ["folder", "file", "work", "link", "link to an empty folder"])
def test_what_is_no_unfinished_merge_of_ours_is_never_touched(
    out: Path, tmp_path: Path, content: str, fresh: bool
) -> None:
    partial = out.with_name("out.partial")
    if content == "file":
        partial.write_text("two years of work")
    else:
        real = tmp_path / "elsewhere" if content.startswith("link") else partial
        real.mkdir()
        if content != "link to an empty folder":
            (real / "thesis.txt").write_text("two years of work")
        if content in {"work", "link"}:
            (real / ".work").mkdir()
        if real != partial:
            partial.symlink_to(real)
    before = digests(partial) if partial.is_dir() else partial.read_bytes()
    with pytest.raises(OutputExistsError, match=r"out\.partial: (exists and is no unfinished|holds thesis.txt, of no)"):
        execute(model_plan(tmp_path, fresh=fresh), out)
    after = digests(partial) if partial.is_dir() else partial.read_bytes()
    if isinstance(after, dict):
        after.pop(".work/lock", None)
    assert after == before


def test_empty_folders_in_the_way_are_no_obstacle(plan: MergePlan, out: Path) -> None:
    out.mkdir()
    out.with_name("out.partial").mkdir()
    execute(plan, out)
    assert {path.name for path in out.parent.iterdir()} == {"out"}


def test_a_link_is_followed_and_stays(plan: MergePlan, out: Path, tmp_path: Path) -> None:
    (tmp_path / "large-disk").mkdir()
    out.symlink_to(tmp_path / "large-disk" / "merged")
    assert execute(plan, out).root == out  # as it was given
    assert out.is_symlink()
    assert {path.name for path in (tmp_path / "large-disk").iterdir()} == {"merged"}
    assert {path.name for path in out.parent.iterdir()} == {"out"}
    assert execute(plan, out).was_done
    execute(model_plan(tmp_path, dtype="bfloat16", fresh=True), out)
    assert out.is_symlink()
    assert {path.name for path in (tmp_path / "large-disk").iterdir()} == {"merged"}


def test_the_base_is_not_overwritten_by_its_own_merge(plan: MergePlan, tmp_path: Path) -> None:
    first = execute(plan, tmp_path / "out").root
    checkpoint = make_checkpoint(tmp_path / "again", {"w": torch.ones(2, 2)})
    binding = binding_of(type(checkpoint)(**{**_fields(checkpoint), "root": first}), {"w": low_rank(2, 2)})
    with pytest.raises(OutputExistsError, match="which this merge reads"):
        execute(plan_merge(binding, MergeOptions(fresh=True)), first)


def _fields(checkpoint: Any) -> dict[str, Any]:
    return {name: getattr(checkpoint, name) for name in ("root", "ref", "config", "tensors", "data_starts", "metadata")}


def test_too_little_disk_is_an_error_before_the_first_byte(
    plan: MergePlan, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(out.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=plan.n_bytes - 1))
    with pytest.raises(DiskSpaceError, match=rf"needs {plan.n_bytes:,} bytes, {plan.n_bytes - 1:,} are free"):
        execute(plan, out)
    assert not list(out.parent.iterdir())


def test_what_an_unfinished_merge_holds_already_counts_as_disk(
    plan: MergePlan, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfinished(plan, out, 3)
    still_needed = sum(shard.n_bytes for shard in plan.shards[3:])
    usage = shutil.disk_usage(out.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=still_needed))
    execute(plan, out)


def test_a_lock_on_a_folder_that_was_put_in_place_meanwhile_is_no_lock(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, published = fcntl.flock, out.with_name("published")

    def flock(descriptor: int, operation: int) -> None:
        if not published.exists():  # the process that held the lock finishes, right before this one gets it
            out.with_name("out.partial").rename(published)
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(out) as partial:
        assert (partial / ".work" / "lock").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    place = tmp_path / "small-disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_fills_up_meanwhile_is_one_error_and_the_merge_resumes(
    plan: MergePlan, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = small_disk / "somebody-elses"
    other.write_bytes(b"x" * 100_000)
    monkeypatch.setattr(EXECUTE, "require_disk", lambda *_: None)
    with pytest.raises(DiskSpaceError, match="No space left on device") as caught:
        execute(plan, small_disk / "out")
    assert caught.value.hint == "free some space or choose another -o"
    assert not [path for path in small_disk.rglob("*") if path.name.endswith(".tmp")]
    other.unlink()
    assert len(merged_shards(plan, small_disk / "out")) < len(plan.shards)
    assert [path.name for path in small_disk.iterdir()] == ["out"]


def test_a_limit_on_file_sizes_is_one_error(plan: MergePlan, out: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(DiskSpaceError, match="File too large"):
            execute(plan, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    execute(plan, out)
    assert {path.name for path in out.parent.iterdir()} == {"out"}


def test_an_output_that_may_not_be_written_is_one_error(plan: MergePlan, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(MergeError, match=r"out\.partial: cannot be written: Read-only file system") as caught:
        execute(plan, small_disk / "out")
    assert caught.value.hint == "choose another -o"


def test_a_place_that_no_rename_can_take_is_refused_before_the_work(plan: MergePlan, small_disk: Path) -> None:
    with pytest.raises(OutputExistsError, match="is a mount point") as caught:
        execute(plan, small_disk)
    assert caught.value.hint == f"-o {small_disk}/merged"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapted_weight_that_is_no_number_stops_the_merge_by_name(tmp_path: Path, out: Path, value: float) -> None:
    weight = torch.ones(300, 64)
    weight[217, 5] = value
    checkpoint = make_checkpoint(tmp_path / "base", {"a.weight": torch.ones(3), "b.weight": weight})
    plan = plan_merge(binding_of(checkpoint, {"b.weight": low_rank(300, 64)}), MergeOptions(device="cpu"))
    with pytest.raises(NonFiniteTensorError, match=rf"b\.weight: element \[217, 5\] of the base is {value}"):
        execute(plan, out)
    assert not out.exists()


def test_a_record_that_cannot_be_read_is_an_error_even_when_asked_to_replace(plan: MergePlan, out: Path) -> None:
    execute(plan, out)
    (out / "merge.json").write_text("{")
    with pytest.raises(InputError, match=r"merge\.json: is not valid JSON"):
        execute(plan, out)


def test_an_error_of_the_system_while_writing_keeps_its_reason(
    plan: MergePlan, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "write", failing)
    with pytest.raises(MergeError, match="cannot be written: Input/output error"):
        execute(plan, out)


def test_the_record_of_a_shard_is_written_after_the_shard_has_reached_the_disk(
    plan: MergePlan, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a power cut cannot leave a record of bytes that were never written."""
    events: list[str] = []
    real_fsync, real_replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        events.append(f"flush {Path(f'/proc/self/fd/{descriptor}').readlink().name}")
        real_fsync(descriptor)

    def replace(path: Path, target: Path) -> Path:
        events.append(f"rename {path.name} to {target.name}")
        return real_replace(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    result: Merged = execute(plan, out)
    for shard in plan.shards:
        names = [event.removeprefix("flush ") for event in events if event.startswith("flush .")]
        temporary = next(name for name in names if name.startswith(f".{shard.file}.{os.getpid()}-"))
        record = next(name for name in names if name.startswith(f".{shard.file}.json.{os.getpid()}-"))
        steps = [
            f"flush {temporary}",
            f"rename {temporary} to {shard.file}",
            "flush out.partial",
            f"flush {record}",
            f"rename {record} to {shard.file}.json",
        ]
        first = events.index(steps[0])
        assert events[first : first + 5] == steps
    assert result.record.artifacts
    flushes = [event for event in events if event.startswith("flush")]
    assert flushes[-2:] == ["flush out.partial", "flush to"]  # the names in the folder, then the folder's own
