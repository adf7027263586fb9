"""Pushes to a hub, through the real client: one commit or none, whatever goes wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lora_deploy.errors import (
    DigestMismatchError,
    HubUnavailableError,
    NotAuthorisedError,
    PushError,
    RateLimitedError,
    ReleaseError,
    RevisionConflictError,
)
from lora_deploy.hubs.options import PushOptions
from lora_deploy.push import preview, pull, push
from lora_deploy.release.manifest import MANIFEST_NAME
from tests.hubs.faults import Fault
from tests.hubs.huggingface_server import Hub
from tests.hubs.releases import FILES, make_release
from tests.hubs.repositories import Blob

NAME = "me/model"
NAMES = {*FILES, MANIFEST_NAME, ".gitattributes"}
N_LARGE = 3


def files_of(hub: Hub, revision: str = "main") -> set[str]:
    repository = hub.store.repositories[NAME]
    commit = repository.resolve(revision)
    assert commit is not None
    return set(repository.commits[commit].files)


def n_commits(hub: Hub, revision: str = "main") -> int:
    return len(hub.store.repositories[NAME].history(revision))


def count(hub: Hub, what: str) -> int:
    return sum(what in request for request in hub.requests)


def test_a_release_lands_in_one_commit_and_is_read_back(hub: Hub, release: Path, options: PushOptions) -> None:
    receipt = push(release, NAME, options)
    assert files_of(hub) == NAMES
    assert n_commits(hub) == 2
    assert receipt.revision == hub.store.repositories[NAME].branches["main"]
    assert set(receipt.digests) == NAMES - {".gitattributes"}
    assert sum(digest.startswith("sha256:") for digest in receipt.digests.values()) == N_LARGE
    assert hub.store.repositories[NAME].private
    assert hub.leaks == []


def test_what_was_pushed_comes_back_the_same(hub: Hub, release: Path, options: PushOptions, tmp_path: Path) -> None:
    push(release, NAME, options)
    pull(NAME, tmp_path / "back", options)
    for name in (*FILES, MANIFEST_NAME):
        assert (tmp_path / "back" / name).read_bytes() == (release / name).read_bytes()


def test_large_files_go_in_parts(hub: Hub, release: Path, options: PushOptions, tmp_path: Path) -> None:
    hub.part_bytes = 7_000
    push(release, NAME, options)
    assert count(hub, "/1") >= N_LARGE - 1
    pull(NAME, tmp_path / "back", options)


def test_the_same_release_again_makes_no_commit(hub: Hub, release: Path, options: PushOptions) -> None:
    first = push(release, NAME, options)
    again = push(release, NAME, options)
    assert again.revision == first.revision
    assert again.n_sent_bytes == 0
    assert n_commits(hub) == 2


def test_files_of_an_earlier_release_go(hub: Hub, release: Path, options: PushOptions, tmp_path: Path) -> None:
    push(release, NAME, options)
    fewer = {name: content for name, content in FILES.items() if "00002-of" not in name or "00001" in name}
    fewer["model.safetensors"] = b"all of it"
    push(make_release(tmp_path / "next", fewer), NAME, options)
    assert files_of(hub) == {*fewer, MANIFEST_NAME, ".gitattributes"}
    assert n_commits(hub) == 3


def test_a_repository_of_something_else_is_left_alone(hub: Hub, release: Path, options: PushOptions) -> None:
    push(release, NAME, options)
    repository = hub.store.repositories[NAME]
    mine = {"weights.bin": Blob(size=1, content=b"x")}
    repository.branches["main"] = repository.add(repository.branches["main"], "mine", mine)
    with pytest.raises(RevisionConflictError, match=r"weights\.bin"):
        push(release, NAME, options)
    assert files_of(hub) == set(mine)
    push(release, NAME, replace(options, yes=True))
    assert files_of(hub) == NAMES - {".gitattributes"}


def test_a_commit_that_came_between_is_a_conflict(hub: Hub, release: Path, options: PushOptions) -> None:
    def race(repository: object) -> None:
        hub.on_before_commit = None
        found = hub.store.repositories[NAME]
        head = found.branches["main"]
        found.branches["main"] = found.add(head, "theirs", {**found.commits[head].files, "x": Blob(1, b"x")})

    hub.on_before_commit = race
    with pytest.raises(RevisionConflictError, match="somebody else") as caught:
        push(release, NAME, options)
    assert caught.value.code == "moved"
    assert files_of(hub) == {".gitattributes", "x"}


def test_a_hub_that_ignores_the_parent_is_caught(hub: Hub, release: Path, options: PushOptions) -> None:
    def race(repository: object) -> None:
        hub.on_before_commit = None
        found = hub.store.repositories[NAME]
        head = found.branches["main"]
        found.branches["main"] = found.add(head, "theirs", dict(found.commits[head].files))

    hub.on_before_commit, hub.ignores_parent = race, True
    with pytest.raises(RevisionConflictError, match="another commit came between"):
        push(release, NAME, options)


def test_a_lost_answer_to_the_commit_is_found_to_have_landed(hub: Hub, release: Path, options: PushOptions) -> None:
    hub.faults.append(Fault("POST", "/commit/", lose_answer=True))
    receipt = push(release, NAME, options)
    assert receipt.revision == hub.store.repositories[NAME].branches["main"]
    assert n_commits(hub) == 2


@pytest.mark.parametrize("status", [409, 429, 500, 503])
def test_a_commit_that_was_refused_for_now_is_tried_again(
    hub: Hub, release: Path, options: PushOptions, status: int
) -> None:
    hub.faults.append(Fault("POST", "/commit/", status=status, text="Another commit operation is in progress", times=2))
    push(release, NAME, options)
    assert n_commits(hub) == 2


@pytest.mark.parametrize(
    ("status", "error", "code"),
    [
        (401, NotAuthorisedError, "unauthorised"),
        (403, NotAuthorisedError, "forbidden"),
        (404, PushError, "not-found"),
        (409, RevisionConflictError, "conflict"),
        (412, RevisionConflictError, "moved"),
        (429, RateLimitedError, "rate-limited"),
        (503, HubUnavailableError, "hub-failed"),
    ],
)
def test_each_refusal_of_the_commit_has_its_own_code(
    hub: Hub, release: Path, options: PushOptions, status: int, error: type[PushError], code: str
) -> None:
    hub.faults.append(Fault("POST", "/commit/", status=status, times=99))
    with pytest.raises(error) as caught:
        push(release, NAME, options)
    assert caught.value.code == code
    assert caught.value.exit_code == 9
    assert str(status) in caught.value.message
    assert files_of(hub) == {".gitattributes"}


def test_a_wrong_token_is_not_authorised(hub: Hub, release: Path) -> None:
    with pytest.raises(NotAuthorisedError) as caught:
        push(release, NAME, PushOptions(token="hf_secretsecret"))
    assert caught.value.code == "unauthorised"
    assert "hf_secretsecret" not in f"{caught.value.message}{caught.value.hint}"


def test_a_token_that_may_only_read_is_forbidden(hub: Hub, release: Path) -> None:
    with pytest.raises(NotAuthorisedError) as caught:
        push(release, NAME, PushOptions(token="hf_reader"))
    assert caught.value.code == "forbidden"


def test_a_push_that_breaks_off_midway_leaves_main_alone_and_resumes(
    hub: Hub, release: Path, options: PushOptions
) -> None:
    hub.faults.append(Fault("PUT", "/whole", status=403, after=1, times=99))
    with pytest.raises(PushError):
        push(release, NAME, options)
    assert files_of(hub) == {".gitattributes"}
    hub.faults.clear()
    hub.requests.clear()
    push(release, NAME, options)
    assert count(hub, "PUT ") == N_LARGE - 1
    assert files_of(hub) == NAMES


def test_an_object_that_storage_corrupts_never_reaches_the_tree(hub: Hub, release: Path, options: PushOptions) -> None:
    hub.faults.append(Fault("PUT", "/whole", corrupt=True, times=99))
    with pytest.raises(PushError):
        push(release, NAME, options)
    assert files_of(hub) == {".gitattributes"}


def test_a_file_changed_after_the_release_is_not_pushed(hub: Hub, release: Path, options: PushOptions) -> None:
    path = release / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(DigestMismatchError, match="00001"):
        push(release, NAME, options)
    assert files_of(hub) == {".gitattributes"}


def test_a_file_that_the_hub_has_and_that_changed_here_is_an_error(
    hub: Hub, release: Path, options: PushOptions
) -> None:
    push(release, NAME, options)
    path = release / "config.json"
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(DigestMismatchError, match=r"config\.json"):
        push(release, NAME, options)


def test_an_extra_file_and_a_link_are_errors(hub: Hub, release: Path, options: PushOptions, tmp_path: Path) -> None:
    (release / "notes.txt").write_text("mine")
    with pytest.raises(ReleaseError, match=r"notes\.txt"):
        push(release, NAME, options)
    (release / "notes.txt").unlink()
    (release / "config.json").rename(tmp_path / "config.json")
    (release / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(Exception, match="is a link"):
        push(release, NAME, options)
    assert NAME not in hub.store.repositories


def test_a_branch_with_a_slash_is_made_from_main(hub: Hub, release: Path, options: PushOptions) -> None:
    push(release, f"hf://{NAME}@feat%2Fx", options)
    assert files_of(hub, "feat/x") == NAMES
    assert files_of(hub, "main") == {".gitattributes"}


def test_a_tag_is_set_once(hub: Hub, release: Path, options: PushOptions, tmp_path: Path) -> None:
    tagged = replace(options, tag="v1")
    receipt = push(release, NAME, tagged)
    assert hub.store.repositories[NAME].tags == {"v1": receipt.revision}
    push(release, NAME, tagged)
    other = make_release(tmp_path / "other", {**FILES, "config.json": b"{}"})
    with pytest.raises(RevisionConflictError, match="tag v1") as caught:
        push(other, NAME, tagged)
    assert caught.value.code == "tag-exists"


def test_a_pull_request_leaves_main_alone(hub: Hub, release: Path, options: PushOptions) -> None:
    receipt = push(release, NAME, replace(options, create_pr=True))
    assert files_of(hub, "refs/pr/1") == NAMES
    assert files_of(hub) == {".gitattributes"}
    assert receipt.revision == hub.store.repositories[NAME].proposals["refs/pr/1"]


def test_public_is_asked_for(hub: Hub, release: Path, options: PushOptions) -> None:
    push(release, NAME, replace(options, private=False))
    assert not hub.store.repositories[NAME].private


@pytest.mark.parametrize("private", [True, False])
def test_nothing_goes_to_a_repository_that_others_see_than_was_asked_for(
    hub: Hub, release: Path, options: PushOptions, private: bool
) -> None:
    push(make_release(release.parent / "first", {"config.json": b"{}"}), NAME, replace(options, private=not private))
    for act in (preview, push):
        with pytest.raises(PushError, match="was asked") as caught:
            act(release, NAME, replace(options, private=private))
        assert caught.value.code == "other-visibility"
    assert n_commits(hub) == 2
    push(release, NAME, options)


def test_a_dry_run_changes_nothing(hub: Hub, release: Path, options: PushOptions) -> None:
    would = preview(release, NAME, options)
    assert {str(file.path) for file in would.to_send} == {*FILES, MANIFEST_NAME}
    assert hub.store.repositories == {}
    assert not any(request.startswith(("POST", "PUT")) for request in hub.requests)


def test_a_hub_that_hangs_ends_by_our_timeout(
    hub: Hub, release: Path, options: PushOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_deploy.hubs import commit, session

    monkeypatch.setattr(session, "READ_SECONDS", 0.5)
    monkeypatch.setattr(commit, "N_TRIES", 1)
    hub.faults.append(Fault("POST", "/commit/", hang_seconds=5))
    with pytest.raises(HubUnavailableError) as caught:
        push(release, NAME, options)
    assert caught.value.code == "timeout"


def test_nothing_listens(release: Path, options: PushOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(HubUnavailableError):
        push(release, NAME, options)


def test_a_corrupt_file_at_the_hub_is_not_pulled(hub: Hub, release: Path, options: PushOptions, tmp_path: Path) -> None:
    push(release, NAME, options)
    repository = hub.store.repositories[NAME]
    head = repository.commits[repository.branches["main"]]
    forged = {**head.files, "config.json": Blob(size=23, content=b"x" * 23)}
    repository.branches["main"] = repository.add(head.id, "forged", forged)
    with pytest.raises(DigestMismatchError, match=r"config\.json"):
        pull(NAME, tmp_path / "back", options)
    assert not (tmp_path / "back").exists()


def test_a_manifest_that_leads_out_is_refused(hub: Hub, release: Path, options: PushOptions, tmp_path: Path) -> None:
    push(release, NAME, options)
    repository = hub.store.repositories[NAME]
    head = repository.commits[repository.branches["main"]]
    manifest = json.loads((release / MANIFEST_NAME).read_text())
    manifest["content"]["files"][0]["path"] = "../../escaped"
    text = json.dumps(manifest).encode()
    forged = {**head.files, MANIFEST_NAME: Blob(size=len(text), content=text)}
    repository.branches["main"] = repository.add(head.id, "forged", forged)
    with pytest.raises(Exception, match="leads out"):
        pull(NAME, tmp_path / "back", options)
    assert not (tmp_path / "escaped").exists()
