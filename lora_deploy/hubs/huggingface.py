"""Repositories of a Hugging-Face-compatible hub: one commit a release.

Promise: large files are sent first, then one commit on the head that was seen makes everything visible; ``main`` never
holds half a release. After an error at the commit the hub is asked what it has: landed, conflict, or try again. The
token goes to the hub only, never to storage, a message or a file.
Source: huggingface_hub 2.4, ``create_commit`` and ``preupload_lfs_files``; ``upload_folder`` makes several commits.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_deploy.artifact import Artifact
from lora_deploy.errors import PushError, RevisionConflictError
from lora_deploy.hubs.answers import asking, meaning_of, status_of
from lora_deploy.hubs.interface import Preview, Published, mismatch, require_unchanged
from lora_deploy.hubs.options import PushOptions
from lora_deploy.merge.progress import Progress, reporting

N_TRIES = 4
_LOCKED, _MOVED, _TOO_MANY = 409, 412, 429
_CHUNK_BYTES = 1 << 20
_CONNECT_SECONDS, _READ_SECONDS = 10.0, 120.0
_KEPT = frozenset({".gitattributes"})
"""Files of the hub's own that a release does not hold and must not remove."""
_MANIFEST = "lora_deploy.json"
pause: Callable[[float], None] = time.sleep
"""Tests replace it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Remote:
    """A file in the repository."""

    n_bytes: int
    digest: str
    """``sha256:…`` where the hub keeps it as a large file, else ``git-sha1:…``."""


class HuggingFace:
    """A model repository as a target."""

    def __init__(self, name: str, revision: str | None, options: PushOptions) -> None:
        """Ask nothing yet."""
        from huggingface_hub import HfApi, constants

        self._name = name
        self._branch = revision or "main"
        self._options = options
        self._api = HfApi(endpoint=constants.ENDPOINT, token=options.token)
        self.url = f"{constants.ENDPOINT}/{name}"

    def preview(self, root: Path, files: Sequence[Artifact]) -> Preview:
        """Compare with the branch as it is."""
        with _settled_client():
            if self._head() is None:
                return Preview(url=self.url, to_send=tuple(files), notes=("the repository would be made",))
            remote = self._tree(self._branch)
        return Preview(url=self.url, to_send=tuple(f for f in files if not _is_there(root, f, remote)))

    def publish(self, root: Path, files: Sequence[Artifact], title: str, progress: Progress | None) -> Published:
        """Make the repository and branch if need be, send what is missing, commit once."""
        with _settled_client():
            head = self._prepare()
            remote = self._tree(head)
            missing = [file for file in files if not _is_there(root, file, remote)]
            doomed = self._doomed(files, remote)
            require_unchanged(root, [file for file in files if file not in missing])
            if not missing and not doomed:
                revision = head
            else:
                self._disable_xet_where_it_is_missing()
                additions = self._send(root, missing, progress)
                revision = self._commit(root, files, additions, doomed, head, title)
                self._require_parent(revision, head)
            self._tag(revision)
        n_sent = sum(file.n_bytes for file in missing)
        notes = () if missing or doomed else ("held this release already",)
        return Published(revision=revision, url=f"{self.url}/tree/{revision}", n_sent_bytes=n_sent, notes=notes)

    def read_back(self, root: Path, files: Sequence[Artifact], published: Published) -> Mapping[str, str]:
        """Take digests from the tree of the commit itself."""
        with _settled_client():
            remote = self._tree(published.revision or self._branch)
        missing = [str(file.path) for file in files if str(file.path) not in remote]
        if missing:
            raise PushError(f"{published.url}: lacks {missing[0]} after the commit", code="not-landed")
        return {str(file.path): remote[str(file.path)].digest for file in files}

    def listing(self) -> Mapping[str, int]:
        """List a revision."""
        with _settled_client():
            return {path: found.n_bytes for path, found in self._tree(self._branch).items()}

    @contextmanager
    def opened(self, path: str) -> Iterator[Iterator[bytes]]:
        """Fetch through the client's own cache, then read."""
        with _settled_client():
            with asking(f"{self.url}@{self._branch}/{path}", self._options.token):
                local = self._api.hf_hub_download(self._name, path, revision=self._branch)
            with Path(local).open("rb", buffering=0) as stream:
                yield iter(lambda: stream.read(_CHUNK_BYTES), b"")

    def _asking(self, what: str = "") -> Any:  # noqa: ANN401 - a context manager
        return asking(f"{self.url}{what}", self._options.token)

    def _head(self) -> str | None:
        try:
            return str(self._api.repo_info(self._name, revision=self._branch).sha)
        except Exception as error:
            if status_of(error) == 404:
                return None
            raise meaning_of(error, self.url, self._options.token) from error

    def _prepare(self) -> str:
        """Make repository and branch where they are missing; give the head that the commit is to follow."""
        head = self._head()
        if head is None:
            with self._asking():
                self._api.create_repo(self._name, private=self._options.private is not False, exist_ok=True)
                if self._branch != "main":
                    self._api.create_branch(self._name, branch=self._branch, exist_ok=True)
            head = self._head()
        if head is None:
            raise PushError(f"{self.url}@{self._branch}: was made and cannot be found", code="not-found")
        return head

    def _tree(self, revision: str) -> dict[str, _Remote]:
        from huggingface_hub.hf_api import RepoFile

        with self._asking(f"@{revision}"):
            entries = list(self._api.list_repo_tree(self._name, recursive=True, revision=revision))
        files = [entry for entry in entries if isinstance(entry, RepoFile)]
        return {
            entry.path: _Remote(
                n_bytes=entry.size,
                digest=f"sha256:{entry.lfs.sha256}" if entry.lfs else f"git-sha1:{entry.blob_id}",
            )
            for entry in files
        }

    def _doomed(self, files: Sequence[Artifact], remote: Mapping[str, _Remote]) -> list[str]:
        """Files of an earlier release that this one does not have; strangers' files need ``--yes``."""
        others = sorted(set(remote) - {str(file.path) for file in files} - _KEPT)
        if others and _MANIFEST not in remote and not self._options.yes:
            raise RevisionConflictError(
                f"{self.url}: holds {others[0]}{' and others' if len(others) > 1 else ''}, which is no release of ours",
                hint="choose another repository or branch, or replace what is there with --yes",
                code="foreign-files",
            )
        return others

    def _disable_xet_where_it_is_missing(self) -> None:
        """The client never asks whether the hub has xet, and does not fall back."""
        from huggingface_hub import constants, get_session
        from huggingface_hub.utils._headers import build_hf_headers

        if constants.HF_HUB_DISABLE_XET:
            return
        url = f"{constants.ENDPOINT}/api/models/{self._name}/xet-write-token/main"
        with self._asking():
            answer = get_session().get(url, headers=build_hf_headers(token=self._options.token))
        if answer.status_code == 404:
            constants.HF_HUB_DISABLE_XET = True

    def _send(self, root: Path, files: Sequence[Artifact], progress: Progress | None) -> list[Any]:
        from huggingface_hub import CommitOperationAdd

        additions = []
        with reporting(progress, "pushing", sum(file.n_bytes for file in files)) as advance:
            for file in files:
                with self._asking(f": {file.path}"):
                    addition = CommitOperationAdd(str(file.path), root / file.path)
                    revision = None if self._options.create_pr else self._branch
                    self._api.preupload_lfs_files(
                        self._name, [addition], revision=revision, create_pr=self._options.create_pr, free_memory=False
                    )
                found = addition.upload_info.sha256.hex()  # of the one pass that the client makes
                if found != file.sha256:
                    raise mismatch(root, file, found)
                additions.append(addition)
                advance(file.n_bytes)
        return additions

    def _commit(
        self,
        root: Path,
        files: Sequence[Artifact],
        additions: Sequence[Any],
        doomed: Sequence[str],
        head: str,
        title: str,
    ) -> str:
        from huggingface_hub import CommitOperationDelete

        operations = [*additions, *(CommitOperationDelete(path_in_repo=path) for path in doomed)]
        for attempt in range(1, N_TRIES + 1):
            try:
                found = self._api.create_commit(
                    self._name,
                    operations,
                    commit_message=self._options.commit_message or title,
                    revision=None if self._options.create_pr else self._branch,
                    create_pr=self._options.create_pr,
                    parent_commit=head,
                )
            except Exception as error:
                landed = self._landed(root, files, doomed, head)
                if landed is not None:
                    return landed
                status = status_of(error)
                is_passing = status in {_LOCKED, _TOO_MANY} or status is None or status >= 500
                if attempt == N_TRIES or not is_passing:
                    raise meaning_of(error, f"{self.url}@{self._branch}", self._options.token) from error
                pause(2**attempt * (0.5 + random.random()))  # noqa: S311 - jitter
            else:
                return str(found.oid)
        raise AssertionError("unreachable")

    def _landed(self, root: Path, files: Sequence[Artifact], doomed: Sequence[str], head: str) -> str | None:
        """The commit whose answer was lost: the head moved, and holds everything that was to be there."""
        if self._options.create_pr:
            return None
        now = self._head()
        if now is None or now == head:
            return None
        remote = self._tree(now)
        is_ours = all(_is_there(root, file, remote) for file in files) and not set(doomed) & set(remote)
        if not is_ours:
            raise RevisionConflictError(
                f"{self.url}@{self._branch}: somebody else committed {now} meanwhile",
                hint="look at it, then push again",
                code="moved",
            )
        return now

    def _require_parent(self, revision: str, head: str) -> None:
        """A hub that ignores the parent it was told may have lost somebody's commit."""
        if self._options.create_pr:
            return
        with self._asking(f"@{revision}"):
            history = self._api.list_repo_commits(self._name, revision=revision)
        parent = history[1].commit_id if len(history) > 1 else None
        if parent != head:
            raise RevisionConflictError(
                f"{self.url}@{revision}: follows {parent}, expected {head}: another commit came between",
                hint="look at the history of the branch",
                code="moved",
            )

    def _tag(self, revision: str) -> None:
        tag = self._options.tag
        if tag is None:
            return
        with self._asking():
            refs = {ref.name: ref.target_commit for ref in self._api.list_repo_refs(self._name).tags}
        if refs.get(tag) == revision:
            return
        if tag in refs:
            raise RevisionConflictError(
                f"{self.url}: tag {tag} is at {refs[tag]}, not at {revision}",
                hint="choose another --tag",
                code="tag-exists",
            )
        with self._asking(f": tag {tag}"):
            self._api.create_tag(self._name, tag=tag, revision=revision)


def _is_there(root: Path, file: Artifact, remote: Mapping[str, _Remote]) -> bool:
    found = remote.get(str(file.path))
    return found is not None and found.n_bytes == file.n_bytes and found.digest == _as_digest(root, file, found.digest)


def _as_digest(root: Path, file: Artifact, like: str) -> str:
    """The file's digest in the form that the hub gives: git's, for small files, over a header and the content."""
    return git_sha1(root / file.path) if like.startswith("git-sha1:") else f"sha256:{file.sha256}"


def git_sha1(path: Path) -> str:
    """The id that git gives a file's content."""
    content = path.read_bytes()
    return "git-sha1:" + hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # noqa: S324 - git's own


@contextmanager
def _settled_client() -> Iterator[None]:
    """Let no call of the client wait for ever, which it does by default, and let it draw no bars beside ours."""
    import sys

    from huggingface_hub.utils import _http
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    def timed() -> Any:  # noqa: ANN401 - a client of the HTTP library that this version uses
        client = _http.default_client_factory()
        library = sys.modules[type(client).__module__.partition(".")[0]]
        client.timeout = library.Timeout(_READ_SECONDS, connect=_CONNECT_SECONDS)
        return client

    before = _http._GLOBAL_CLIENT_FACTORY  # noqa: SLF001 - there is no way to ask for it
    had_bars = not are_progress_bars_disabled()
    _http.set_client_factory(timed)
    if had_bars:
        disable_progress_bars()
    try:
        yield
    finally:
        _http.set_client_factory(before)
        if had_bars:
            enable_progress_bars()
