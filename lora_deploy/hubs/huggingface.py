"""Repositories of a Hugging-Face-compatible hub: one commit a release.

Promise: what is there is compared first, and what is of no release of ours is left alone; then comes one commit, and a
tag last, on what was read back. The token goes to the hub only, never to storage, a message or a file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from lora_deploy.artifact import Artifact
from lora_deploy.errors import DigestMismatchError, PushError, RevisionConflictError
from lora_deploy.hubs import session
from lora_deploy.hubs.commit import OneCommit
from lora_deploy.hubs.interface import Preview, Published, require_unchanged
from lora_deploy.hubs.options import PushOptions
from lora_deploy.hubs.repository import Remote, Repository, git_blob_hash, is_there, released_paths
from lora_deploy.hubs.session import settled_client
from lora_deploy.merge.progress import Progress

_CHUNK_BYTES = 1 << 20
_KEPT = frozenset({".gitattributes"})
"""Files of the hub's own that a release does not hold and must not remove."""
_CARD = "README.md"
_MANIFEST = "lora_deploy.json"
_OWN = (_MANIFEST, "model.sig")


class HuggingFace:
    """A model repository as a target."""

    def __init__(self, name: str, revision: str | None, options: PushOptions) -> None:
        """Ask nothing yet."""
        self._branch = revision or "main"
        self._options = options
        self._repository = Repository(name, options.token)
        self._listed: tuple[str, Mapping[str, Remote]] | None = None
        self.url = self._repository.url

    def preview(self, root: Path, files: Sequence[Artifact]) -> Preview:
        """Compare with the branch as it is."""
        with settled_client():
            head = self._repository.head(self._branch)
            if head is None:
                is_new = self._repository.head("main") is None
                what = "the repository" if is_new else f"branch {self._branch}"
                return Preview(url=self.url, to_send=tuple(files), notes=(f"{what} would be made",))
            self._require_branch()
            self._require_visibility()
            remote = self._repository.tree(head)
            missing = [file for file in files if not is_there(root, file, remote)]
            doomed = self._doomed(files, remote, head)
            self._require_free_tag(None if missing or doomed else head)
        notes = [f"{path} would be removed" for path in doomed]
        if not missing and not doomed:
            notes.append("it holds this release already")
        return Preview(url=self.url, to_send=tuple(missing), notes=tuple(notes))

    def publish(self, root: Path, files: Sequence[Artifact], title: str, progress: Progress | None) -> Published:
        """Make the repository and branch if need be, send what is missing, commit once."""
        with settled_client():
            head = self._prepare()
            remote = self._repository.tree(head)
            missing = [file for file in files if not is_there(root, file, remote)]
            doomed = self._doomed(files, remote, head)
            require_unchanged(root, [file for file in files if file not in missing])
            if not missing and not doomed:
                self._require_free_tag(head)
                url = f"{self.url}/tree/{head}"
                return Published(revision=head, url=url, n_sent_bytes=0, notes=("it held this release already",))
            self._require_free_tag(None)
            self._require_card(root, missing)
            notes = self._choose_transfer()
            commit = OneCommit(self._repository, self._branch, self._options, head)
            commit.send(root, missing, progress)
            revision, pull_request = commit.make(root, files, doomed, self._options.commit_message or title)
        return Published(
            revision=revision,
            url=f"{self.url}/tree/{revision}",
            n_sent_bytes=sum(file.n_bytes for file in missing),
            notes=notes,
            pull_request=pull_request,
        )

    def read_back(self, root: Path, files: Sequence[Artifact], published: Published) -> Mapping[str, str]:
        """Take digests from the tree of the commit itself."""
        with settled_client():
            remote = self._repository.tree(published.revision or self._branch)
        missing = [str(file.path) for file in files if str(file.path) not in remote]
        if missing:
            raise PushError(f"{published.url}: lacks {missing[0]} after the commit", code="not-landed")
        extra = sorted(set(remote) - {str(file.path) for file in files} - _KEPT)
        if extra:
            raise PushError(f"{published.url}: still holds {extra[0]} after the commit", code="not-landed")
        return {str(file.path): remote[str(file.path)].digest for file in files}

    def set_tag(self, published: Published) -> None:
        """Name the commit that was read back."""
        tag, revision = self._options.tag, published.revision
        if tag is None or revision is None:
            return
        with settled_client():
            if self._require_free_tag(revision):
                return
            try:
                self._repository.set_tag(tag, revision)
            except PushError:
                if not self._require_free_tag(revision):  # else the answer was lost
                    raise

    def listing(self) -> Mapping[str, int]:
        """List the commit that the revision is at now; files are then fetched from that one."""
        with settled_client():
            head = self._repository.head(self._branch)
            if head is None:
                raise PushError(
                    f"{self.url}@{self._branch}: no such repository or revision",
                    hint="what is private looks as if it were not there: set HF_TOKEN, or pass --token",
                    code="not-found",
                )
            self._listed = head, self._repository.tree(head)
        return {path: found.n_bytes for path, found in self._listed[1].items()}

    @contextmanager
    def opened(self, path: str) -> Iterator[Iterator[bytes]]:
        """Fetch through the client's own cache, then read; what has not the digest that the hub lists is an error."""
        revision, remote = self._listed or (self._branch, {})
        with settled_client():
            local = self._repository.fetched(path, revision)
        yield self._checked(local, path, remote.get(path))

    def _checked(self, local: Path, path: str, remote: Remote | None) -> Iterator[bytes]:
        is_git = remote is not None and remote.digest.startswith("git-sha1:")
        hashed = git_blob_hash(local.stat().st_size) if is_git else hashlib.sha256()
        with local.open("rb", buffering=0) as stream:
            while piece := stream.read(_CHUNK_BYTES):
                hashed.update(piece)
                yield piece
        found = f"{'git-sha1' if is_git else 'sha256'}:{hashed.hexdigest()}"
        if remote is not None and found != remote.digest:
            local.resolve().unlink(missing_ok=True)  # else the client would give it again
            raise DigestMismatchError(
                f"{self.url}/{path}: found {found}, expected {remote.digest}",
                hint="the copy in the client's cache was removed: the same command fetches it again",
            )

    def _prepare(self) -> str:
        """Make repository and branch where they are missing; give the head that the commit is to follow."""
        head = self._repository.head(self._branch)
        if head is None:
            self._repository.make(self._branch, private=self._options.private is not False)
            head = self._repository.head(self._branch)
        self._require_visibility()
        if head is None:
            raise PushError(f"{self.url}@{self._branch}: was made and cannot be found", code="not-found")
        self._require_branch()
        return head

    def _require_visibility(self) -> None:
        """What was asked for holds for a repository that is there, too: nothing private goes where all see it."""
        wanted = self._options.private
        if wanted is not None and self._repository.is_private() is not wanted:
            found, asked = ("public", "private") if wanted else ("private", "public")
            raise PushError(
                f"{self.url}: is {found}, and --{asked} was asked for",
                hint="change it in the repository's settings, or leave the option out",
                code="other-visibility",
            )

    def _require_branch(self) -> None:
        """A commit follows a branch or a pull request; tags and commits are revisions too, and nothing follows them."""
        if self._branch == "main" or self._branch.startswith("refs/pr/"):
            return
        refs = self._repository.refs()
        if self._branch not in refs.branches:
            kind = "a tag" if self._branch in refs.tags else "no branch"
            raise PushError(
                f"{self.url}@{self._branch}: is {kind}, and a push goes to a branch",
                hint="name a branch with --revision; a tag is set with --tag",
                code="no-branch",
            )

    def _doomed(self, files: Sequence[Artifact], remote: Mapping[str, Remote], head: str) -> list[str]:
        """Files of an earlier release that this one does not have; what no release of ours named needs ``--yes``."""
        others = sorted(set(remote) - {str(file.path) for file in files} - _KEPT)
        if others and not self._options.yes:
            own = self._released_at(head) if _MANIFEST in remote else set()
            foreign = [path for path in others if path not in own]
            if foreign:
                raise RevisionConflictError(
                    f"{self.url}: holds {foreign[0]}{' and others' if len(foreign) > 1 else ''}, which is of no "
                    "release of ours and would be removed",
                    hint="choose another repository or branch, or let it be removed with --yes",
                    code="foreign-files",
                )
        return others

    def _released_at(self, head: str) -> set[str]:
        content = self._repository.fetched(_MANIFEST, head).read_bytes()
        try:
            return released_paths(json.loads(content), _OWN)
        except ValueError:
            return set()

    def _require_card(self, root: Path, files: Sequence[Artifact]) -> None:
        """Let the hub judge the card's metadata before anything is sent; the client asks only at the commit."""
        if any(str(file.path) == _CARD for file in files):
            with self._repository.asking(f": {_CARD}"):
                text = (root / _CARD).read_text("utf-8")
                self._repository.api._validate_yaml(text, repo_type="model", token=self._options.token)  # noqa: SLF001

    def _choose_transfer(self) -> tuple[str, ...]:
        """The client never asks whether the hub has xet, and does not fall back."""
        if not session.uses_xet():
            return ()
        if self._repository.has_xet(self._branch, create_pr=self._options.create_pr):
            return ()
        session.disable_xet()
        return ("the hub has no xet: large files went over LFS",)

    def _require_free_tag(self, revision: str | None) -> bool:
        """Whether the tag is at this commit; at another one it is an error."""
        tag = self._options.tag
        if tag is None:
            return False
        there = self._repository.refs().tags.get(tag)
        if there is not None and there != revision:
            raise RevisionConflictError(
                f"{self.url}: tag {tag} is at {there}, which is not this release",
                hint="choose another --tag",
                code="tag-exists",
            )
        return there is not None
