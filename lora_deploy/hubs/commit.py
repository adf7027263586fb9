"""The only commit of a push: on the head that was seen, or not at all.

Promise: large files are sent first, then one commit makes everything visible; ``main`` never holds half a release.
After an error at the commit the hub is asked what it has: landed, conflict, or try again.
Source: huggingface_hub 2.4, ``create_commit`` and ``preupload_lfs_files``; ``upload_folder`` makes several commits.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_deploy.artifact import Artifact
from lora_deploy.errors import HubUnavailableError, RevisionConflictError
from lora_deploy.hubs import repository, session
from lora_deploy.hubs.answers import MAX_WAIT_SECONDS, asked_wait, is_passing, status_of
from lora_deploy.hubs.interface import mismatch
from lora_deploy.hubs.options import PushOptions
from lora_deploy.hubs.repository import Repository, is_there
from lora_deploy.merge.progress import Progress, reporting

N_TRIES = 4
_LOCKED = 409
_IN_MEMORY_BYTES = 10_000_000
"""Files up to this size may travel inside the commit: they are read once, and those bytes are checked and sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Changes:
    """What a commit is to do besides adding what was sent."""

    doomed: Sequence[str]
    title: str
    proposals: frozenset[str]
    """Pull requests that there were before."""


class OneCommit:
    """What is to follow one head of one branch."""

    def __init__(self, repository: Repository, branch: str, options: PushOptions, head: str) -> None:
        """Send nothing yet."""
        self._repository, self._branch, self._options, self._head = repository, branch, options, head
        self._additions: list[Any] = []

    def send(self, root: Path, files: Sequence[Artifact], progress: Progress | None) -> None:
        """Send large files, one after the other; small ones wait for the commit.

        Raises:
            DigestMismatchError: A file is not the one listed; it may be at the hub then, and in no commit.
        """
        from huggingface_hub import CommitOperationAdd

        hashes_first = not session.uses_xet()  # over LFS the client hashes, then sends; xet does both in one pass
        with reporting(progress, "pushing", sum(file.n_bytes for file in files)) as advance:
            for file in files:
                is_small = file.n_bytes <= _IN_MEMORY_BYTES
                with self._repository.asking(f": {file.path}"):
                    source = (root / file.path).read_bytes() if is_small else root / file.path
                    addition = CommitOperationAdd(str(file.path), source)
                    if hashes_first or is_small:
                        _require_same(root, file, addition)
                    self._repository.api.preupload_lfs_files(
                        self._repository.name,
                        [addition],
                        revision=self._branch,
                        create_pr=self._options.create_pr,
                    )
                    _require_same(root, file, addition)
                self._additions.append(addition)
                advance(file.n_bytes)

    def make(self, root: Path, files: Sequence[Artifact], doomed: Sequence[str], title: str) -> tuple[str, str | None]:
        """Commit what was sent, and remove what is doomed; give the commit, and the pull request's address if any.

        Raises:
            RevisionConflictError: Somebody else committed meanwhile.
            PushError: The hub did not take it; there is no commit.
        """
        proposals = frozenset(self._proposals() if self._options.create_pr else ())
        changes = _Changes(doomed=doomed, title=title, proposals=proposals)
        revision, pull_request = self._commit(root, files, changes)
        self._require_parent(revision)
        return revision, pull_request

    def _commit(self, root: Path, files: Sequence[Artifact], changes: _Changes) -> tuple[str, str | None]:
        from huggingface_hub import CommitOperationDelete

        deletions = [CommitOperationDelete(path_in_repo=path, is_folder=False) for path in changes.doomed]
        for attempt in range(1, N_TRIES + 1):
            try:
                found = self._repository.api.create_commit(
                    self._repository.name,
                    [*self._additions, *deletions],
                    commit_message=changes.title,
                    revision=self._branch,
                    create_pr=self._options.create_pr,
                    parent_commit=self._head,
                )
            except Exception as error:
                landed = self._landed(root, files, changes)
                if landed is not None:
                    return landed
                wait = asked_wait(error) or 2**attempt * (0.5 + random.random())  # noqa: S311 - jitter
                may_pass = is_passing(error) or status_of(error) in {_LOCKED, None}
                if attempt == N_TRIES or not may_pass or wait > MAX_WAIT_SECONDS:
                    with self._repository.asking(f"@{self._branch}"):
                        raise
                repository.pause(wait)
            else:
                return str(found.oid), found.pr_url
        raise AssertionError("unreachable")

    def _landed(self, root: Path, files: Sequence[Artifact], changes: _Changes) -> tuple[str, str | None] | None:
        """The commit whose answer was lost: the head moved, and holds everything that was to be there.

        None also where the hub cannot be asked: a commit that landed then makes the next try a conflict, and that leads
        here again.
        """
        try:
            if self._options.create_pr:
                return self._proposed(root, files, changes)
            now = self._repository.head(self._branch)
            if now is None or now == self._head:
                return None
            if self._is_ours(root, files, changes, now):
                return now, None
        except HubUnavailableError:
            return None
        raise RevisionConflictError(
            f"{self._repository.url}@{self._branch}: somebody else committed {now} meanwhile",
            hint="look at it, then push again",
            code="moved",
        )

    def _proposed(self, root: Path, files: Sequence[Artifact], changes: _Changes) -> tuple[str, str] | None:
        """A pull request that was not there before and holds everything."""
        for ref, commit in self._proposals().items():
            if ref not in changes.proposals and self._is_ours(root, files, changes, commit):
                return commit, f"{self._repository.url}/discussions/{ref.rpartition('/')[2]}"
        return None

    def _proposals(self) -> Mapping[str, str]:
        return self._repository.refs(with_proposals=True).proposals

    def _is_ours(self, root: Path, files: Sequence[Artifact], changes: _Changes, commit: str) -> bool:
        remote = self._repository.tree(commit)
        return all(is_there(root, file, remote) for file in files) and not set(changes.doomed) & set(remote)

    def _require_parent(self, revision: str) -> None:
        """A hub that ignores the parent it was told may have lost somebody's commit."""
        parent = self._repository.parent_of(revision)
        if parent != self._head:
            where = f"{self._repository.url}@{revision}"
            raise RevisionConflictError(
                f"{where}: follows {parent}, expected {self._head}: another commit came between",
                hint="look at the history of the branch",
                code="moved",
            )


def _require_same(root: Path, file: Artifact, addition: Any) -> None:  # noqa: ANN401 - the client's operation
    """Compare the digest of the one pass that the client makes."""
    found = addition.upload_info.sha256.hex()
    if found != file.sha256:
        raise mismatch(root, file, found)
