"""Pushes to a folder: it is what it was, or the whole release."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lora_deploy.errors import DigestMismatchError, OutputExistsError, PushError, RecipeError, RevisionConflictError
from lora_deploy.hubs.open import open_hub
from lora_deploy.hubs.options import PushOptions
from lora_deploy.push import preview, pull, push
from lora_deploy.release.manifest import MANIFEST_NAME, check
from tests.hubs.releases import FILES, make_release

OPTIONS = PushOptions()


def test_round_trip(release: Path, tmp_path: Path) -> None:
    target = tmp_path / "a folder" / "x"
    receipt = push(release, target.as_uri(), OPTIONS)
    assert receipt.n_sent_bytes == receipt.n_bytes
    assert pull(str(target), tmp_path / "back", OPTIONS) == check(release)
    assert {p.name for p in target.iterdir()} == {Path(name).parts[0] for name in (*FILES, MANIFEST_NAME)}


def test_again_sends_nothing(release: Path, tmp_path: Path) -> None:
    push(release, str(tmp_path / "x"), OPTIONS)
    assert push(release, str(tmp_path / "x"), OPTIONS).n_sent_bytes == 0
    assert preview(release, str(tmp_path / "x"), OPTIONS).to_send == ()


def test_another_release_is_replaced_on_request_only(release: Path, tmp_path: Path) -> None:
    target = str(tmp_path / "x")
    push(make_release(tmp_path / "old", {"config.json": b"{}"}), target, OPTIONS)
    with pytest.raises(RevisionConflictError, match="holds something else"):
        push(release, target, OPTIONS)
    assert (tmp_path / "x" / "config.json").read_bytes() == b"{}"
    push(release, target, replace(OPTIONS, yes=True))
    check(tmp_path / "x")


def test_a_changed_file_is_not_pushed(release: Path, tmp_path: Path) -> None:
    path = release / "config.json"
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(DigestMismatchError, match=r"config\.json"):
        push(release, str(tmp_path / "x"), OPTIONS)
    assert not (tmp_path / "x").exists()


def test_a_corrupt_copy_is_not_pulled(release: Path, tmp_path: Path) -> None:
    push(release, str(tmp_path / "x"), OPTIONS)
    path = tmp_path / "x" / "onnx" / "model.onnx"
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(DigestMismatchError, match=r"model\.onnx"):
        pull(str(tmp_path / "x"), tmp_path / "back", OPTIONS)
    assert not (tmp_path / "back").exists()


def test_nothing_is_pulled_over_something(release: Path, tmp_path: Path) -> None:
    (tmp_path / "back").mkdir()
    (tmp_path / "back" / "mine").write_text("mine")
    with pytest.raises(OutputExistsError):
        pull(str(release), tmp_path / "back", OPTIONS)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PushError, match="no such folder"):
        pull(str(tmp_path / "gone"), tmp_path / "back", OPTIONS)


@pytest.mark.parametrize("target", ["name", "a/b/c", "ftp://host/x", "file://host/x", "hf://name", "owner/name@"])
def test_a_target_of_no_known_form(target: str) -> None:
    with pytest.raises(RecipeError), open_hub(target, OPTIONS):
        pass


def test_a_target_of_two_forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    with (
        pytest.raises(RecipeError, match="is a folder here and the form of a repository"),
        open_hub("owner/name", OPTIONS),
    ):
        pass


def push_and_die(release: Path, target: Path, moment: int) -> bool:
    """Push in a process that kills itself at its n-th change of the disk; say whether it got to die."""
    child = os.fork()
    if child == 0:
        n_events = 0

        def die(event: str, args: tuple[object, ...]) -> None:
            nonlocal n_events
            if event in {"open", "os.rename", "os.mkdir", "os.remove"} and str(release) not in str(args[0]):
                n_events += 1
                if n_events == moment:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(die)
        push(release, str(target), PushOptions(yes=True))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status in {0, signal.SIGKILL}
    return status == signal.SIGKILL


def test_killed_at_any_moment_the_target_is_the_old_or_the_new_release(release: Path, tmp_path: Path) -> None:
    old = make_release(tmp_path / "old", {"config.json": b"{}"})
    target = tmp_path / "x"
    push(old, str(target), OPTIONS)
    moment = 1
    while push_and_die(release, target, moment):
        if target.exists():
            check(target)  # whole, whichever it is
        push(old, str(target), replace(OPTIONS, yes=True))
        check(target)
        moment += 3
    assert moment > 15
