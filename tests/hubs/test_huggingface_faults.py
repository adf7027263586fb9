"""What goes wrong between the client and a hub, and what a push makes of it."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import pytest

from lora_deploy.errors import (
    DigestMismatchError,
    HubUnavailableError,
    NotAuthorisedError,
    PushError,
    RateLimitedError,
    RecipeError,
    RevisionConflictError,
)
from lora_deploy.hubs.options import PushOptions
from lora_deploy.push import preview, pull, push
from lora_deploy.release.manifest import MANIFEST_NAME, check
from tests.hubs.faults import Fault
from tests.hubs.huggingface_server import Hub
from tests.hubs.releases import FILES, make_release
from tests.hubs.repositories import Blob
from tests.hubs.test_huggingface import N_LARGE, NAME, NAMES, count, files_of, n_commits
from tests.hubs.xet import known_xet


def test_storage_that_fails_twice_gets_the_object_at_last(
    hub: Hub, release: Path, options: PushOptions, pauses: list[float]
) -> None:
    hub.faults.append(Fault("PUT", "/whole", status=503, times=2))
    push(release, NAME, options)
    assert files_of(hub) == NAMES
    assert count(hub, "PUT ") == N_LARGE + 2
    assert pauses == [1, 2]


@pytest.mark.parametrize("fault", ["abort_after", "fail_after"])
def test_an_upload_that_is_cut_in_the_middle_is_sent_again(
    hub: Hub, release: Path, options: PushOptions, pauses: list[float], fault: str, tmp_path: Path
) -> None:
    hub.faults.append(Fault("PUT", "/whole", **{fault: 1000}))
    push(release, NAME, options)
    assert count(hub, "PUT ") == N_LARGE + 1
    assert len(pauses) == 1
    assert pull(NAME, tmp_path / "back", options) == check(release)


def test_parts_that_are_cut_are_sent_again(
    hub: Hub, release: Path, options: PushOptions, pauses: list[float], tmp_path: Path
) -> None:
    hub.part_bytes = 7_000
    hub.faults.append(Fault("PUT", "/2$", abort_after=1000))
    push(release, NAME, options)
    assert len(pauses) == 1
    assert pull(NAME, tmp_path / "back", options) == check(release)


@pytest.mark.parametrize(
    ("headers", "expected"), [({"ratelimit": '"api";r=0;t=55'}, 56), ({"retry-after": "7"}, 8), ({}, None)]
)
@pytest.mark.parametrize("path", ["/preupload/", "/commit/", "/tree/", "/revision/main"])
def test_a_hub_that_wants_to_be_left_alone_for_a_while_is(
    hub: Hub, release: Path, options: PushOptions, pauses: list[float], path: str, headers: dict, expected: float | None
) -> None:
    method = "GET" if path in {"/tree/", "/revision/main"} else "POST"
    hub.faults.append(Fault(method, path, status=429, headers=headers))
    push(release, NAME, options)
    assert files_of(hub) == NAMES
    assert len(pauses) == 1
    assert pauses[0] == expected or (expected is None and pauses[0] < 8)


def test_a_wait_that_is_too_long_is_the_users(
    hub: Hub, release: Path, options: PushOptions, pauses: list[float]
) -> None:
    hub.faults.append(Fault("POST", "/commit/", status=429, headers={"retry-after": "3600"}))
    with pytest.raises(RateLimitedError):
        push(release, NAME, options)
    assert pauses == []


CALLS = {
    "asking for the head": ("GET", "/revision/main"),
    "making the repository": ("POST", "/repos/create"),
    "the tree": ("GET", "/tree/"),
    "the card": ("POST", "/validate-yaml"),
    "asking for xet": ("GET", "/xet-write-token/"),
    "upload modes": ("POST", "/preupload/"),
    "the batch": ("POST", "/objects/batch"),
    "an object": ("PUT", "/whole"),
    "verifying": ("POST", "/lfs-verify"),
    "the commit": ("POST", "/commit/"),
    "the history": ("GET", "/commits/"),
    "the tags": ("GET", "/refs"),
    "the tag": ("POST", "/tag/"),
}


@pytest.mark.parametrize("call", CALLS)
def test_no_call_waits_for_ever(
    hub: Hub,
    release: Path,
    options: PushOptions,
    pauses: list[float],
    monkeypatch: pytest.MonkeyPatch,
    call: str,
) -> None:
    from huggingface_hub.utils import _http

    from lora_deploy.hubs import commit, session

    backoff = _http._http_backoff_base
    monkeypatch.setattr(_http, "_http_backoff_base", lambda *a, **k: backoff(*a, **{**k, "max_retries": 1}))
    monkeypatch.setattr(session, "READ_SECONDS", 0.25)
    monkeypatch.setattr(commit, "N_TRIES", 1)
    method, path = CALLS[call]
    hub.faults.append(Fault(method, path, hang_seconds=1.5, times=9))
    with pytest.raises(HubUnavailableError) as caught:
        push(release, NAME, replace(options, tag="v1"))
    assert caught.value.code == "timeout"


@pytest.mark.parametrize("call", [("HEAD", "/resolve/"), ("GET", "/resolve/"), ("GET", "/whole"), ("GET", "/tree/")])
def test_no_call_of_a_pull_waits_for_ever(
    hub: Hub,
    release: Path,
    options: PushOptions,
    pauses: list[float],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    call: tuple[str, str],
) -> None:
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _http

    from lora_deploy.hubs import session

    push(release, NAME, options)
    backoff = _http._http_backoff_base
    monkeypatch.setattr(_http, "_http_backoff_base", lambda *a, **k: backoff(*a, **{**k, "max_retries": 1}))
    monkeypatch.setattr(session, "READ_SECONDS", 0.25)
    for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):
        monkeypatch.setattr(constants, name, 0.25)
    monkeypatch.setattr(file_download, "_ETAG_RETRY_TIMEOUT", 0.25)
    hub.faults.append(Fault(*call, hang_seconds=0.6, times=99))
    with pytest.raises(HubUnavailableError):
        pull(NAME, tmp_path / "back", options)
    assert not (tmp_path / "back").exists()


def test_a_commit_whose_outcome_cannot_be_asked_for_is_found_by_the_next_try(
    hub: Hub, release: Path, options: PushOptions
) -> None:
    hub.faults.append(Fault("POST", "/commit/", lose_answer=True))
    hub.faults.append(Fault("GET", "/revision/main", status=503, after=2, times=3))
    receipt = push(release, NAME, options)
    assert receipt.revision == hub.store.repositories[NAME].branches["main"]
    assert n_commits(hub) == 2


def test_a_pull_request_whose_answer_was_lost_is_not_opened_twice(
    hub: Hub, release: Path, options: PushOptions
) -> None:
    hub.faults.append(Fault("POST", "/commit/", lose_answer=True))
    receipt = push(release, NAME, replace(options, create_pr=True))
    proposals = hub.store.repositories[NAME].proposals
    assert proposals == {"refs/pr/1": receipt.revision}
    assert receipt.pull_request == f"{hub.url}/{NAME}/discussions/1"


def test_a_tag_whose_answer_was_lost_is_found_to_be_set(hub: Hub, release: Path, options: PushOptions) -> None:
    hub.faults.append(Fault("POST", "/tag/", lose_answer=True))
    receipt = push(release, NAME, replace(options, tag="v1"))
    assert hub.store.repositories[NAME].tags == {"v1": receipt.revision}


def test_a_tree_that_came_in_pages_is_read_whole(hub: Hub, release: Path, options: PushOptions) -> None:
    hub.page = 2
    assert set(push(release, NAME, options).digests) == NAMES - {".gitattributes"}


def test_what_the_hub_holds_is_compared_before_it_is_tagged(hub: Hub, release: Path, options: PushOptions) -> None:
    """A hub that keeps another file than it was sent, as some do with line ends."""

    def forge(path: str, blob: Blob) -> Blob:
        return Blob(size=blob.size, content=b"x" * blob.size) if path == "config.json" else blob

    hub.on_commit = forge
    with pytest.raises(PushError, match=r"config\.json: the target says git-sha1"):
        push(release, NAME, replace(options, tag="v1"))
    assert hub.store.repositories[NAME].tags == {}


def test_a_card_that_the_hub_refuses_is_refused_before_anything_is_sent(
    hub: Hub, tmp_path: Path, options: PushOptions
) -> None:
    root = make_release(tmp_path / "bad", {**FILES, "README.md": b"---\nlicense: [mit\n---\n"})
    with pytest.raises(PushError, match="bad YAML") as caught:
        push(root, NAME, options)
    assert caught.value.code == "refused"
    assert count(hub, "PUT ") == 0
    assert files_of(hub) == {".gitattributes"}


def test_a_private_repository_of_somebody_else_looks_as_if_it_were_not_there(
    hub: Hub, release: Path, options: PushOptions, tmp_path: Path
) -> None:
    push(release, NAME, options)
    other = PushOptions(token="hf_other")
    with pytest.raises(NotAuthorisedError) as caught:
        push(release, NAME, other)
    assert caught.value.code == "forbidden"
    with pytest.raises(PushError) as gone:
        pull(NAME, tmp_path / "back", other)
    assert gone.value.code == "not-found"
    assert "HF_TOKEN" in str(gone.value.hint)


def test_without_a_token_nobody_pushes(hub: Hub, release: Path) -> None:
    with pytest.raises(NotAuthorisedError) as caught:
        push(release, NAME, PushOptions())
    assert caught.value.code == "unauthorised"
    assert "no credentials were given" in caught.value.message
    assert "HF_TOKEN" in str(caught.value.hint)
    assert hub.store.repositories == {}


def test_offline_nothing_is_asked(
    hub: Hub, release: Path, options: PushOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnavailableError) as caught:
        push(release, NAME, options)
    assert caught.value.code == "offline"
    assert hub.requests == []


def test_an_organisations_repository(hub: Hub, release: Path, options: PushOptions) -> None:
    push(release, "team/model", options)
    assert "team/model" in hub.store.repositories


def test_who_may_only_read_opens_a_pull_request(hub: Hub, release: Path, options: PushOptions) -> None:
    push(make_release(release.parent / "first", {"config.json": b"{}"}), NAME, replace(options, private=False))
    receipt = push(release, NAME, PushOptions(token="hf_other", create_pr=True))
    assert files_of(hub, "refs/pr/1") == NAMES
    assert receipt.pull_request == f"{hub.url}/{NAME}/discussions/1"


def test_a_pull_request_is_against_the_branch_that_was_named(hub: Hub, release: Path, options: PushOptions) -> None:
    small = make_release(release.parent / "first", {"config.json": b"{}"})
    head = push(small, f"{NAME}@dev", options).revision
    push(release, NAME, replace(options, create_pr=True, revision="dev"))
    repository = hub.store.repositories[NAME]
    assert repository.commits[repository.proposals["refs/pr/1"]].parent == head
    again = make_release(release.parent / "second", {"config.json": b"[]"})
    push(again, NAME, replace(options, revision="refs/pr/1"))  # a second commit of the same pull request
    assert files_of(hub, "refs/pr/1") == {"config.json", MANIFEST_NAME, ".gitattributes"}
    assert files_of(hub, "dev") == {"config.json", MANIFEST_NAME, ".gitattributes"}
    assert list(repository.proposals) == ["refs/pr/1"]


def test_a_push_goes_to_no_tag_and_no_commit(hub: Hub, release: Path, options: PushOptions) -> None:
    commit = push(release, NAME, replace(options, tag="v1")).revision
    for revision in ("v1", commit):
        with pytest.raises(PushError, match="a push goes to a branch") as caught:
            push(release, NAME, replace(options, revision=revision))
        assert caught.value.code == "no-branch"


def test_a_release_is_pulled_by_tag_branch_and_commit(
    hub: Hub, release: Path, options: PushOptions, tmp_path: Path
) -> None:
    commit = push(release, f"{NAME}@feat%2Fx", replace(options, tag="v1")).revision
    push(make_release(tmp_path / "next", {"config.json": b"{}"}), f"{NAME}@feat%2Fx", options)
    for k, revision in enumerate(("v1", commit)):
        assert pull(f"{NAME}@{revision}", tmp_path / f"back{k}", options) == check(release)
    assert pull(f"hf://{NAME}@feat%2Fx", tmp_path / "next-back", options) == check(tmp_path / "next")


@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00002.safetensors", MANIFEST_NAME])
def test_a_copy_that_rotted_in_the_clients_cache_is_fetched_again(
    hub: Hub, release: Path, options: PushOptions, tmp_path: Path, name: str
) -> None:
    push(release, NAME, options)
    pull(NAME, tmp_path / "first", options)
    copy = next((tmp_path / "hf-cache").rglob(f"snapshots/*/{name}")).resolve()
    copy.write_bytes(copy.read_bytes()[::-1])
    with pytest.raises(DigestMismatchError, match=name):
        pull(NAME, tmp_path / "back", options)
    assert pull(NAME, tmp_path / "back", options) == check(release)


def test_a_branch_that_moves_while_it_is_pulled_is_pulled_as_it_was(
    hub: Hub, release: Path, options: PushOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_deploy.hubs.huggingface import HuggingFace

    push(release, NAME, options)
    listing = HuggingFace.listing
    other = make_release(tmp_path / "next", {"config.json": b"{}"})

    def moved(self: HuggingFace) -> object:
        found = listing(self)
        push(other, NAME, options)
        return found

    monkeypatch.setattr(HuggingFace, "listing", moved)
    assert pull(NAME, tmp_path / "back", options) == check(release)


def test_a_tag_of_another_release_stops_a_push_before_it_sends(
    hub: Hub, release: Path, options: PushOptions, tmp_path: Path
) -> None:
    head = push(release, NAME, replace(options, tag="v1")).revision
    n_requests = len(hub.requests)
    other = make_release(tmp_path / "other", {**FILES, "config.json": b"{}"})
    with pytest.raises(RevisionConflictError, match="tag v1"):
        push(other, NAME, replace(options, tag="v1"))
    assert hub.store.repositories[NAME].branches["main"] == head
    assert not any(request.startswith(("POST", "PUT")) for request in hub.requests[n_requests:])


def test_a_file_that_somebody_added_to_a_release_is_neither_kept_nor_lost_in_silence(
    hub: Hub, release: Path, options: PushOptions, tmp_path: Path
) -> None:
    push(release, NAME, options)
    repository = hub.store.repositories[NAME]
    head = repository.commits[repository.branches["main"]]
    added = {**head.files, "logo.png": Blob(size=1, content=b"x")}
    repository.branches["main"] = repository.add(head.id, "a logo", added)
    with pytest.raises(PushError, match=r"logo\.png") as caught:
        push(release, NAME, options)
    assert caught.value.code == "foreign-files"
    with pytest.raises(RevisionConflictError, match=r"logo\.png"):
        preview(release, NAME, options)
    with pytest.raises(Exception, match=r"logo\.png, which its manifest does not name"):
        pull(NAME, tmp_path / "back", options)
    assert preview(release, NAME, replace(options, yes=True)).notes == ("logo.png would be removed",)
    push(release, NAME, replace(options, yes=True))
    assert files_of(hub) == NAMES


# ------------------------------------------------------------------------------------------------------------------ xet


@known_xet
def test_over_xet_a_release_lands_in_one_commit_and_comes_back(
    xet_hub: Hub, release: Path, options: PushOptions, tmp_path: Path
) -> None:
    receipt = push(release, NAME, options)
    assert files_of(xet_hub) == NAMES
    assert n_commits(xet_hub) == 2
    assert count(xet_hub, "PUT ") == count(xet_hub, "/objects/batch") == 0
    assert len(xet_hub._xet_hashes()) == N_LARGE
    assert receipt.notes == ()
    assert pull(NAME, tmp_path / "back", options) == check(release)
    assert push(release, NAME, options).n_sent_bytes == 0


@known_xet
def test_over_xet_a_file_changed_since_never_reaches_the_tree(
    xet_hub: Hub, release: Path, options: PushOptions
) -> None:
    """Only hf_xet hashes the large file, in the pass in which it sends it."""
    path = release / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(Exception, match="00001"):
        push(release, NAME, options)
    assert files_of(xet_hub) == {".gitattributes"}


@known_xet
def test_over_xet_who_may_only_read_opens_a_pull_request(xet_hub: Hub, release: Path, options: PushOptions) -> None:
    push(make_release(release.parent / "first", {"config.json": b"{}"}), NAME, replace(options, private=False))
    push(release, NAME, PushOptions(token="hf_other", create_pr=True))
    assert files_of(xet_hub, "refs/pr/1") == NAMES
    assert count(xet_hub, "/objects/batch") == 0


@known_xet
def test_over_xet_a_lost_answer_to_the_commit_is_found_to_have_landed(
    xet_hub: Hub, release: Path, options: PushOptions
) -> None:
    xet_hub.faults.append(Fault("POST", "/commit/", lose_answer=True))
    push(release, NAME, options)
    assert n_commits(xet_hub) == 2


@known_xet
@pytest.mark.parametrize(
    ("status", "code"),
    [(401, "unauthorised"), (403, "forbidden"), (404, "not-found"), (429, "rate-limited"), (503, "hub-failed")],
)
def test_over_xet_each_refusal_of_a_token_has_its_own_code(
    xet_hub: Hub, release: Path, options: PushOptions, pauses: list[float], status: int, code: str
) -> None:
    """The first asking is ours, the next the client's: what it raises then is no HTTP error."""
    xet_hub.faults.append(Fault("GET", "/xet-write-token/", status=status, after=1, times=99))
    with pytest.raises(PushError) as caught:
        push(release, NAME, options)
    assert caught.value.code == code
    assert "hf_writer" not in f"{caught.value.message}{caught.value.hint}"


@pytest.mark.parametrize("status", [404, 405, 501, 200])  # 200: a page, as some give for whatever they do not know
def test_a_hub_without_xet_gets_its_files_over_lfs_and_the_setting_comes_back(
    hub: Hub, release: Path, options: PushOptions, status: int
) -> None:
    from huggingface_hub import constants

    hub.faults.append(Fault("GET", "/xet-write-token/", status=status, times=99))
    receipt = push(release, NAME, options)
    assert receipt.notes == ("the hub has no xet: large files went over LFS",)
    assert count(hub, "PUT ") == N_LARGE
    assert not constants.HF_HUB_DISABLE_XET


@known_xet
@pytest.mark.nightly
def test_a_xet_store_that_hangs_ends_by_its_clients_timeout(xet_hub: Hub, release: Path, tmp_path: Path) -> None:
    """A process of its own, because hf_xet reads its settings when it is imported."""
    limits = {"HF_XET_CLIENT_READ_TIMEOUT": "1s", "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "1"}
    world = {"HF_ENDPOINT": xet_hub.url, "HF_TOKEN": "hf_writer", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "h")}
    command = [sys.executable, "-m", "lora_deploy", "push", str(release), NAME, "--json"]
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        xet_hub.xet_address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        found = subprocess.run(
            command, env={**os.environ, **limits, **world}, capture_output=True, text=True, timeout=90, check=False
        )
    assert found.returncode == 9, found.stderr
    assert json.loads(found.stdout)["error"]["code"] == "hub-unavailable"
    assert files_of(xet_hub) == {".gitattributes"}


# ---------------------------------------------------------------------------------------------------------------- token

SECRET = "hf_verysecretverysecret"


@pytest.fixture
def secret_hub(hub: Hub) -> Hub:
    hub.tokens[SECRET] = ("me", "write")
    return hub


@pytest.mark.parametrize("has_xet", [False, True])
@pytest.mark.parametrize("goes_by", ["--token", "HF_TOKEN"])
def test_the_token_is_in_no_log_document_or_file_and_storage_never_sees_it(
    secret_hub: Hub,
    release: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    goes_by: str,
    has_xet: bool,
) -> None:
    import logging

    from tests.e2e.commands import run

    if has_xet:
        secret_hub.xet = tmp_path / "xet"
        secret_hub.xet.mkdir()
    secret_hub.faults.append(Fault("POST", "/commit/", lose_answer=True))
    logging.getLogger("huggingface_hub").setLevel(logging.DEBUG)
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
    caplog.set_level(logging.DEBUG)
    words = ["--token", SECRET] if goes_by == "--token" else []
    if not words:
        monkeypatch.setenv("HF_TOKEN", SECRET)
    said = [
        run("push", release, NAME, "--tag", "v1", "--json", *words),
        run("push", release, NAME, "--dry-run", *words),
    ]
    said += [run("pull", NAME, tmp_path / "back", "--json", *words)]
    assert [found.exit_code for found in said] == [0, 0, 0]
    texts = [f"{found.stdout}{found.stderr}" for found in said] + [caplog.text]
    texts += [path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file()]
    assert caplog.text
    assert not any(SECRET in text for text in texts)
    assert secret_hub.leaks == []
    assert any("whole" in request for request in secret_hub.requests) is not has_xet


@pytest.mark.parametrize("path", ["/commit/", "/revision/main", "/preupload/", "/repos/create"])
@pytest.mark.parametrize("goes_by", ["--token", "HF_TOKEN"])
def test_a_hub_that_repeats_the_token_is_not_repeated(
    secret_hub: Hub, release: Path, monkeypatch: pytest.MonkeyPatch, path: str, goes_by: str
) -> None:
    method = "GET" if "revision" in path else "POST"
    secret_hub.faults.append(Fault(method, path, status=403, text=f"no rights for {SECRET}", times=99))
    if goes_by == "HF_TOKEN":
        monkeypatch.setenv("HF_TOKEN", SECRET)
    with pytest.raises(NotAuthorisedError) as caught:
        push(release, NAME, PushOptions(token=SECRET if goes_by == "--token" else None))
    shown = io.StringIO()
    traceback.print_exception(caught.value, file=shown)
    assert SECRET not in shown.getvalue()
    assert "no rights for …" in shown.getvalue()


@pytest.mark.parametrize("token", ["", "hf_x y", "hf_x\n", "hf_\x1b", "hf_é"])
def test_a_token_that_no_header_can_carry_is_refused_unseen(token: str) -> None:
    with pytest.raises(RecipeError) as caught:
        PushOptions(token=token)
    assert token.strip() == "" or token.strip() not in f"{caught.value.message}{caught.value.hint}"
    assert "token" not in repr(PushOptions(token="hf_secret"))
