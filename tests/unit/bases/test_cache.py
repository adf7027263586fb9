"""A folder made from a base appears whole or not at all, and once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lora_deploy.artifact import cache_root
from lora_deploy.bases.cache import check_room, made_once
from lora_deploy.errors import DiskSpaceError, MergeError


def test_a_folder_is_made_once(tmp_path: Path) -> None:
    calls: list[Path] = []

    def make(folder: Path) -> None:
        calls.append(folder)
        (folder / "a").write_text("made")

    assert made_once("base", make) == made_once("base", make) == cache_root() / "bases" / "base"
    assert (cache_root() / "bases" / "base" / "a").read_text() == "made"
    assert len(calls) == 1


def test_what_fails_leaves_nothing_behind_and_what_was_killed_is_swept() -> None:
    stale = cache_root() / "bases" / "base.k1ll3d.partial"
    stale.mkdir(parents=True)

    def fail(folder: Path) -> None:
        (folder / "half").write_text("written")
        raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"):
        made_once("base", fail)
    assert [path.name for path in stale.parent.iterdir()] == ["base.lock"]


def test_a_full_disk_is_foreseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(total=900, used=800, free=100))
    with pytest.raises(DiskSpaceError, match="found 100 free bytes, the unpacked base needs 1000"):
        check_room(tmp_path, 1000)


def test_a_cache_that_cannot_be_written_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LORA_DEPLOY_CACHE", str(tmp_path / "file"))
    with pytest.raises(MergeError, match="cannot be written"):
        made_once("base", Path.mkdir)
