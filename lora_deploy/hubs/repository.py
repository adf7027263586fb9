"""One repository of a Hugging-Face-compatible hub: what it holds, and the single calls that change it.

Promise: every call ends, and fails as one of our errors; calls that may be repeated are, where the hub says that it
failed for now. The token goes to the hub only.
Source: huggingface_hub 2.4, ``HfApi``.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from lora_deploy.artifact import Artifact
from lora_deploy.errors import PushError
from lora_deploy.hubs.answers import asking, patiently
from lora_deploy.hubs.interface import mismatch

T = TypeVar("T")
_CHUNK_BYTES = 1 << 22
_NO_XET = (404, 405, 501)
pause: Callable[[float], None] = time.sleep
"""Tests replace it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Remote:
    """A file in the repository."""

    n_bytes: int
    digest: str
    """``sha256:…`` where the hub keeps it as a large file, else ``git-sha1:…``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refs:
    """Names of commits."""

    branches: Mapping[str, str]
    tags: Mapping[str, str]
    proposals: Mapping[str, str]
    """Pull requests, by ``refs/pr/N``; those that were closed too."""


class Repository:
    """A model repository."""

    def __init__(self, name: str, token: str | None) -> None:
        """Ask nothing yet."""
        from huggingface_hub import HfApi, constants

        self.name = name
        self.url = f"{constants.ENDPOINT}/{name}"
        self.api = HfApi(endpoint=constants.ENDPOINT, token=token)
        self._token = token

    def asking(self, what: str = "") -> AbstractContextManager[None]:
        """Turn what the client raises into our errors."""
        return asking(f"{self.url}{what}", self.secrets)

    def secrets(self) -> Iterable[str]:
        """Give what must be in no message."""
        from huggingface_hub import get_token

        return [token for token in (self._token or get_token(),) if token]

    def _ask(self, what: str, call: Callable[[], T]) -> T:
        with self.asking(what):
            found: T = patiently(call, lambda seconds: pause(seconds))  # noqa: PLW0108 - tests replace it
        return found

    def head(self, revision: str) -> str | None:
        """Give the commit that a revision is at; None where there is no such revision, or no such repository."""
        try:
            return str(self._ask("", lambda: self.api.repo_info(self.name, revision=revision)).sha)
        except PushError as error:
            if error.code == "not-found":
                return None
            raise

    def is_private(self) -> bool:
        """Whether only its owners see it."""
        return bool(self._ask("", lambda: self.api.repo_info(self.name)).private)

    def tree(self, revision: str) -> dict[str, Remote]:
        """List a revision's files."""
        from huggingface_hub.hf_api import RepoFile

        entries = self._ask(
            f"@{revision}", lambda: list(self.api.list_repo_tree(self.name, recursive=True, revision=revision))
        )
        return {
            entry.path: Remote(
                n_bytes=entry.size,
                digest=f"sha256:{entry.lfs.sha256}" if entry.lfs else f"git-sha1:{entry.blob_id}",
            )
            for entry in entries
            if isinstance(entry, RepoFile)
        }

    def refs(self, *, with_proposals: bool = False) -> Refs:
        """List branches and tags, and pull requests if asked to."""
        found = self._ask("", lambda: self.api.list_repo_refs(self.name, include_pull_requests=with_proposals))
        return Refs(
            branches={ref.name: ref.target_commit for ref in found.branches},
            tags={ref.name: ref.target_commit for ref in found.tags},
            proposals={ref.ref: ref.target_commit for ref in found.pull_requests or ()},
        )

    def parent_of(self, revision: str) -> str | None:
        """Give the commit before a commit."""
        history = self._ask(f"@{revision}", lambda: self.api.list_repo_commits(self.name, revision=revision))
        return history[1].commit_id if len(history) > 1 else None

    def make(self, branch: str, *, private: bool) -> None:
        """Make the repository and the branch; what is there already stays."""
        with self.asking():
            self.api.create_repo(self.name, private=private, exist_ok=True)
            if branch != "main":
                self.api.create_branch(self.name, branch=branch, exist_ok=True)

    def set_tag(self, tag: str, revision: str) -> None:
        """Name a commit."""
        self._ask(f": tag {tag}", lambda: self.api.create_tag(self.name, tag=tag, revision=revision))

    def has_xet(self, revision: str, *, create_pr: bool) -> bool:
        """Ask for what the client would ask for; a hub without xet does not know the route, or answers with a page."""
        from huggingface_hub import constants, get_session
        from huggingface_hub.utils._headers import build_hf_headers

        url = f"{constants.ENDPOINT}/api/models/{self.name}/xet-write-token/{quote(revision, safe='')}"

        def call() -> Any:  # noqa: ANN401 - an answer of the HTTP library
            headers = build_hf_headers(token=self._token)
            answer = get_session().get(url, headers=headers, params={"create_pr": "1"} if create_pr else None)
            if answer.status_code not in _NO_XET:
                answer.raise_for_status()
            return answer

        answer = self._ask(": asking for xet", call)
        return answer.status_code not in _NO_XET and "x-xet-cas-url" in answer.headers

    def fetched(self, path: str, revision: str) -> Path:
        """Fetch a file into the client's own cache."""
        with self.asking(f"@{revision}/{path}"):
            return Path(self.api.hf_hub_download(self.name, path, revision=revision))


def is_there(root: Path, file: Artifact, remote: Mapping[str, Remote]) -> bool:
    """Whether the repository has this file.

    Raises:
        DigestMismatchError: The file here is not the one listed.
    """
    found = remote.get(str(file.path))
    return found is not None and found.n_bytes == file.n_bytes and found.digest == digest_like(root, file, found.digest)


def digest_like(root: Path, file: Artifact, like: str) -> str:
    """Give the file's digest in the form that the hub gave: for small files git's, of a header and the content.

    Raises:
        DigestMismatchError: The file here is not the one listed.
    """
    if not like.startswith("git-sha1:"):
        return f"sha256:{file.sha256}"
    git, sha256 = git_blob_hash(file.n_bytes), hashlib.sha256()
    with (root / file.path).open("rb", buffering=0) as stream:
        while piece := stream.read(_CHUNK_BYTES):
            git.update(piece)
            sha256.update(piece)
    if sha256.hexdigest() != file.sha256:
        raise mismatch(root, file, sha256.hexdigest())
    return f"git-sha1:{git.hexdigest()}"


def git_blob_hash(n_bytes: int) -> Any:  # noqa: ANN401 - a hash of hashlib
    """Begin the id that git gives a file of this size."""
    return hashlib.sha1(b"blob %d\0" % n_bytes)  # noqa: S324 - git's own


def released_paths(manifest: object, own: Sequence[str]) -> set[str]:
    """Give the files that a manifest, read as JSON, names, and those that are always a release's own."""
    found = set(own)
    for part in ("content", "evidence"):
        try:
            found |= {str(file["path"]) for file in manifest[part]["files"]}  # type: ignore[index]
        except (KeyError, TypeError):
            continue
    return found
