"""Pushes to a folder: it is what it was, or the whole release."""

from __future__ import annotations

import os
import resource
import signal
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from lora_deploy.artifact import Artifact
from lora_deploy.errors import (
    DigestMismatchError,
    MergeError,
    OutputExistsError,
    PushError,
    RecipeError,
    ReleaseError,
    RevisionConflictError,
    UnsafeFileError,
)
from lora_deploy.hubs.open import open_hub
from lora_deploy.hubs.options import PushOptions
from lora_deploy.push import preview, pull, push
from lora_deploy.release.manifest import MANIFEST_NAME, check
from tests.e2e.commands import document
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


@pytest.mark.parametrize(
    ("target", "hint"),
    [
        ("https://huggingface.co/owner/name", "HF_ENDPOINT"),
        ("owner/name:v1", "owner/name@v1"),
        ("here", "./here"),
        ("name", "owner/name[@rev]"),
    ],
)
def test_what_was_meant_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, hint: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(RecipeError) as caught, open_hub(target, OPTIONS):
        pass
    assert hint in str(caught.value.hint)


def test_a_release_that_is_not_there(tmp_path: Path) -> None:
    assert document("push", tmp_path / "gone", tmp_path / "x", exit_code=3)["error"]["message"].endswith(
        "no such folder"
    )


def test_a_target_of_two_forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    with (
        pytest.raises(RecipeError, match="is a folder here and the form of a repository"),
        open_hub("owner/name", OPTIONS),
    ):
        pass


@pytest.mark.parametrize("name", ["notes.txt", ".gitattributes.bak", ".cache/other", "sub/x.bin", ".gitignore"])
def test_what_the_manifest_does_not_name_is_neither_pushed_nor_pulled(release: Path, tmp_path: Path, name: str) -> None:
    push(release, str(tmp_path / "x"), OPTIONS)
    for root in (release, tmp_path / "x"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("mine")
    with pytest.raises(ReleaseError, match=name) as caught:
        push(release, str(tmp_path / "y"), OPTIONS)
    assert caught.value.code == "extra-file"
    with pytest.raises(ReleaseError, match="its manifest does not name") as caught:
        pull(str(tmp_path / "x"), tmp_path / "back", OPTIONS)
    assert caught.value.code == "extra-file"
    with pytest.raises(ReleaseError, match=name):
        check(tmp_path / "x")
    (release / name).unlink()
    with pytest.raises(RevisionConflictError):  # it is there, and so is something else
        push(release, str(tmp_path / "x"), OPTIONS)


@pytest.mark.parametrize("name", [".gitattributes", ".cache/huggingface/download/x.metadata"])
def test_what_hubs_and_their_clients_leave_is_let_pass(release: Path, tmp_path: Path, name: str) -> None:
    push(release, str(tmp_path / "x"), OPTIONS)
    for root in (release, tmp_path / "x"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("theirs")
    assert push(release, str(tmp_path / "x"), OPTIONS).n_sent_bytes == 0
    push(release, str(tmp_path / "y"), OPTIONS)
    assert not (tmp_path / "y" / name).exists()
    assert pull(str(tmp_path / "x"), tmp_path / "back", OPTIONS) == check(tmp_path / "x")
    assert not (tmp_path / "back" / name).exists()


@pytest.mark.parametrize("name", ["config.json", MANIFEST_NAME, "onnx"])
def test_links_are_neither_pushed_nor_pulled(release: Path, tmp_path: Path, name: str) -> None:
    push(release, str(tmp_path / "x"), OPTIONS)
    for k, root in enumerate((release, tmp_path / "x")):
        (root / name).rename(tmp_path / f"away{k}")
        (root / name).symlink_to(tmp_path / f"away{k}")
    with pytest.raises(UnsafeFileError, match=f"{name}: is a link"):
        push(release, str(tmp_path / "y"), OPTIONS)
    with pytest.raises((UnsafeFileError, ReleaseError), match=r"is a link|lacks onnx/model\.onnx"):
        pull(str(tmp_path / "x"), tmp_path / "back", OPTIONS)
    assert not (tmp_path / "back").exists()


def test_a_link_that_nothing_names_is_an_extra_file(release: Path, tmp_path: Path) -> None:
    push(release, str(tmp_path / "x"), OPTIONS)
    (tmp_path / "x" / "sub").symlink_to(tmp_path)
    with pytest.raises(ReleaseError, match="sub") as caught:
        pull(str(tmp_path / "x"), tmp_path / "back", OPTIONS)
    assert caught.value.code == "extra-file"


def test_the_release_itself_is_no_target(release: Path, tmp_path: Path) -> None:
    for target in (release, release / "inside", tmp_path):
        with pytest.raises(RecipeError, match="is the release itself, or one lies in the other"):
            push(release, str(target), replace(OPTIONS, yes=True))
    check(release)


def test_options_of_repositories_are_refused(release: Path, tmp_path: Path) -> None:
    for options in (
        replace(OPTIONS, tag="v1"),
        replace(OPTIONS, revision="dev"),
        replace(OPTIONS, create_pr=True),
        replace(OPTIONS, private=True),
        replace(OPTIONS, private=False),
        replace(OPTIONS, commit_message="x"),
        replace(OPTIONS, token="x"),
    ):
        with pytest.raises(RecipeError, match=r"--\S+ is for "):
            push(release, str(tmp_path / "x"), options)
    with pytest.raises(RecipeError, match="no release yet"):
        replace(OPTIONS, create_pr=True, tag="v1")
    with pytest.raises(RecipeError, match="--tag: is empty"):
        replace(OPTIONS, tag=" ")
    assert not (tmp_path / "x").exists()


def test_a_folder_that_cannot_be_written(release: Path) -> None:
    with pytest.raises(PushError, match="cannot be written") as caught:
        push(release, "/proc/x", OPTIONS)
    assert "-o" not in str(caught.value.hint)
    with pytest.raises(MergeError, match="cannot be written") as pulled:
        pull(str(release), Path("/proc/x"), OPTIONS)
    assert "-o" not in str(pulled.value.hint)


def test_a_file_in_the_place_of_the_folder(release: Path, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    with pytest.raises(RevisionConflictError, match="is no folder"):
        push(release, str(tmp_path / "x"), replace(OPTIONS, yes=True))
    assert (tmp_path / "x").read_text() == "mine"


def test_a_copy_that_is_wrong_on_disk_is_found(release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_deploy.hubs import folder

    def rotten(partial: Path, out: Path) -> None:
        put(partial, out)
        (out / "config.json").write_bytes(FILES["config.json"][::-1])

    put = folder.publish
    monkeypatch.setattr(folder, "publish", rotten)
    with pytest.raises(PushError, match=r"config\.json: the target says"):
        push(release, str(tmp_path / "x"), OPTIONS)


def test_a_push_that_broke_off_copies_only_the_rest(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_deploy.hubs import folder

    copy, copied = folder._copy, []

    def cut(root: Path, file: Artifact, partial: Path) -> int:
        if len(copied) == 3:
            raise PushError("cut")
        copied.append(file)
        return copy(root, file, partial)

    with monkeypatch.context() as patch:
        patch.setattr(folder, "_copy", cut)
        with pytest.raises(PushError, match="cut"):
            push(release, str(tmp_path / "x"), OPTIONS)
    assert not (tmp_path / "x").exists()
    receipt = push(release, str(tmp_path / "x"), OPTIONS)
    assert receipt.n_sent_bytes == receipt.n_bytes - sum(file.n_bytes for file in copied)


def push_and_die_at_byte(release: Path, target: Path, n_bytes: int) -> bool:
    """Push in a process that the system ends once it has written so many bytes of a file; say whether it got to."""
    child = os.fork()
    if child == 0:
        with suppress(BaseException):
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))
            push(release, str(target), PushOptions(yes=True))
            os._exit(0)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert status in {0, signal.SIGXFSZ}
    return status == signal.SIGXFSZ


def test_killed_within_any_file_the_target_is_what_it_was_and_the_next_push_ends_the_work(
    release: Path, tmp_path: Path
) -> None:
    target = tmp_path / "x"
    old = make_release(tmp_path / "old", {"config.json": b"{}"})
    push(old, str(target), OPTIONS)
    before = check(target)
    sizes = sorted({path.stat().st_size for path in release.rglob("*") if path.is_file()})
    for n_bytes in sorted({1, 4096, *(size - 1 for size in sizes), *(size // 2 for size in sizes)}):
        assert push_and_die_at_byte(release, target, n_bytes)
        assert check(target) == before
    assert not push_and_die_at_byte(release, target, sizes[-1])
    assert check(target) == check(release)
    assert not (tmp_path / "x.partial").exists()


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
