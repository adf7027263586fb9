"""A Hugging-Face-compatible hub on loopback, faithful where a push depends on it, driven by the real client.

Two origins: the hub on 127.0.0.1, storage on 127.0.0.2. It checks what the real one checks: tokens and their rights,
signed storage addresses, sizes and digests of objects, the parent of a commit, that a large file was verified before a
commit names it, the card's metadata. Large files come over LFS, or, where ``xet`` names a folder, over the xet
protocol: hf_xet itself then cuts them into chunks below that folder. ``faults`` make the hub misbehave; ``requests`` is
what was asked; ``leaks`` are tokens that storage saw.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote

import uvicorn
import yaml

from tests.hubs.faults import Fault
from tests.hubs.repositories import Blob, Repository, Store, sha256_of
from tests.hubs.transport import Answer, Call, CutError, RefusedError, ranged, receive_file, send_answer
from tests.hubs.xet import stored_hashes

KEY = b"storage"
REGULAR_BYTES = 10_000_000
Scope = dict[str, Any]


@dataclass
class Hub:
    store: Store
    tokens: dict[str, tuple[str, str]]
    """Token to user and role."""
    lfs_extensions: tuple[str, ...] = (".safetensors", ".onnx", ".data")
    part_bytes: int | None = None
    """Size of parts; None takes objects whole."""
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    on_before_commit: Callable[[Repository], None] | None = None
    ignores_parent: bool = False
    on_commit: Callable[[str, Blob], Blob] | None = None
    """What is kept in place of a file of a commit."""
    organisations: dict[str, set[str]] = field(default_factory=lambda: {"team": {"me"}})
    """Who may write to a namespace besides the user of that name."""
    xet: Path | None = None
    xet_address: str | None = None
    """Where large files go in place of that folder."""
    page: int = 1000
    """Entries of a page of a tree."""
    url: str = ""
    storage_url: str = ""

    # ------------------------------------------------------------------------------------------------------ transport

    def app(self, *, is_storage: bool) -> Callable[..., Awaitable[None]]:
        async def run(scope: Scope, receive: Any, send: Any) -> None:
            if scope["type"] != "http":
                return
            path = scope["raw_path"].decode()
            call = Call(
                method=scope["method"],
                parts=[unquote(part) for part in path.strip("/").split("/")],
                query=parse_qs(scope["query_string"].decode()),
                headers={k.decode().lower(): v.decode() for k, v in scope["headers"]},
                receive=receive,
            )
            self.requests.append(f"{call.method} {path}")
            if is_storage and "authorization" in call.headers:
                self.leaks.append(call.headers["authorization"])
            fault = next((f for f in self.faults if f.strikes(call.method, path)), None)
            try:
                answer = await self._answer(call, fault, is_storage=is_storage)
            except RefusedError as refused:
                answer = Answer.of(refused.body, refused.status)
                answer.headers |= {"x-error-message": refused.message, "x-request-id": "test"}
                if refused.code:
                    answer.headers["x-error-code"] = refused.code
            except CutError:
                # uvicorn turns an exception before the response into a 500: begin one, then break it off.
                await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"9")]})
                raise ConnectionAbortedError from None
            if fault is not None:
                answer.headers |= fault.headers
            await send_answer(answer, call, send)

        return run

    async def _answer(self, call: Call, fault: Fault | None, *, is_storage: bool) -> Answer:
        if fault is not None:
            await asyncio.sleep(fault.hang_seconds)
            call.abort_after, call.fail_after = fault.abort_after, fault.fail_after
            if fault.status:
                raise RefusedError(fault.status, fault.text)
        answer = await (self._storage(call, fault) if is_storage else self._hub(call))
        if fault is not None and fault.lose_answer:
            raise CutError
        return answer

    # ------------------------------------------------------------------------------------------------------------ hub

    async def _hub(self, call: Call) -> Answer:
        parts, method = call.parts, call.method
        match method, parts:
            case "POST", ["api", "repos", "create"]:
                return self._create(self._user(call), await call.json())
            case "POST", ["api", "validate-yaml"]:
                return _validate(await call.json())
            case "GET", ["api", "whoami-v2"]:
                return Answer.of({"name": self._user(call)[0], "type": "user", "auth": {}})
            case "POST", [owner, name, "info", "lfs", "objects", "batch"]:
                self._user(call)  # who may only read sends objects for a pull request
                return self._batch(
                    self._repository(call, owner, name.removesuffix(".git"), writes=False), await call.json()
                )
            case "POST", [owner, name, "lfs-verify"]:
                self._user(call)
                return self._verify(self._repository(call, owner, name, writes=False), await call.json())
            case _, ["api", "models", owner, name, *rest]:
                writes = method == "POST" or "xet-write-token" in rest
                if "create_pr" in call.query:
                    self._user(call)
                    writes = False
                return await self._model(call, self._repository(call, owner, name, writes=writes), rest)
            case (("GET" | "HEAD"), [owner, name, "resolve", revision, *path]):
                return self._resolve(self._repository(call, owner, name, writes=False), revision, "/".join(path))
        raise RefusedError(404, f"no such route: {method} {parts}")

    async def _model(self, call: Call, repository: Repository, rest: list[str]) -> Answer:
        match call.method, rest:
            case "GET", []:
                return self._about(repository, "main")
            case "GET", ["revision", revision]:
                return self._about(repository, revision)
            case "GET", ["tree", revision, *_]:
                return self._tree(repository, revision, int(call.query.get("cursor", ["0"])[0]))
            case "GET", [("xet-read-token" | "xet-write-token"), revision]:
                if "create_pr" not in call.query:  # with it the client asks for a revision "None"
                    self._commit_of(repository, revision)
                return self._xet_token()
            case "GET", ["commits", revision]:
                self._commit_of(repository, revision)
                return Answer.of([_log(commit) for commit in repository.history(revision)])
            case "GET", ["refs"]:
                return Answer.of(_refs(repository, with_proposals="include_prs" in call.query))
            case "POST", ["preupload", revision]:
                return self._preupload(repository, revision, await call.json())
            case "POST", ["branch", branch]:
                return self._branch(repository, branch, await call.json())
            case "POST", ["tag", revision]:
                return self._tag(repository, revision, await call.json())
            case "POST", ["commit", revision]:
                if call.headers.get("content-type") != "application/x-ndjson":
                    raise RefusedError(415, "expected application/x-ndjson")
                return self._commit(repository, revision, await call.body(), is_proposal="create_pr" in call.query)
        raise RefusedError(404, "Not Found")

    def _user(self, call: Call) -> tuple[str, str]:
        given = call.headers.get("authorization", "").removeprefix("Bearer ")
        if not given:
            raise RefusedError(401, "Invalid username or password.")
        if given not in self.tokens:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        return self.tokens[given]

    def _repository(self, call: Call, owner: str, name: str, *, writes: bool) -> Repository:
        given = call.headers.get("authorization", "").removeprefix("Bearer ")
        user, role = self._user(call) if writes or given else ("", "read")
        found = self.store.repositories.get(f"{owner}/{name}")
        is_own = user == owner or user in self.organisations.get(owner, set())
        if found is None or (found.private and not is_own):
            raise RefusedError(404 if user else 401, "Repository not found", "RepoNotFound")
        if writes and not (is_own and role == "write"):
            raise RefusedError(403, "You don't have the rights to write here")
        return found

    def _create(self, user: tuple[str, str], wanted: dict[str, Any]) -> Answer:
        owner = wanted.get("organization") or user[0]
        is_own = owner == user[0] or user[0] in self.organisations.get(owner, set())
        if not is_own or user[1] != "write":
            raise RefusedError(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        name = f"{owner}/{wanted['name']}"
        url = f"{self.url}/{name}"
        with self.store.lock:
            if name in self.store.repositories:
                raise RefusedError(409, "You already created this model repo", body={"error": "exists", "url": url})
            self.store.repositories[name] = Repository(name, private=wanted.get("visibility") != "public")
        return Answer.of({"url": url, "name": name})

    def _tree(self, repository: Repository, revision: str, start: int) -> Answer:
        hashes = self._xet_hashes()
        entries = []
        for path, blob in sorted(self._commit_of(repository, revision).files.items()):
            entry = blob.to_json(path)
            if blob.sha256 in hashes:
                entry["xetHash"] = hashes[blob.sha256]
            entries.append(entry)
        answer = Answer.of(entries[start : start + self.page])
        if start + self.page < len(entries):
            place = f"{self.url}/api/models/{repository.name}/tree/{quote(revision, safe='')}"
            query = f"recursive=true&cursor={start + self.page}"
            answer.headers["link"] = f'<{place}?{query}>; rel="next"'
        return answer

    def _xet_hashes(self) -> dict[str, str]:
        return stored_hashes(self.xet) if self.xet is not None else {}

    def _xet_token(self) -> Answer:
        if self.xet is None:
            raise RefusedError(404, "Not Found")
        address, expires = self.xet_address or f"local://{self.xet}", int(time.time()) + 3600
        answer = Answer.of({"casUrl": address, "accessToken": "xet_secret", "exp": expires})
        answer.headers |= {"x-xet-cas-url": address, "x-xet-access-token": "xet_secret"}
        answer.headers["x-xet-token-expiration"] = str(expires)
        return answer

    def _commit_of(self, repository: Repository, revision: str) -> Any:
        found = repository.resolve(revision)
        if found is None:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repository.commits[found]

    def _about(self, repository: Repository, revision: str) -> Answer:
        commit = self._commit_of(repository, revision)
        siblings = [{"rfilename": path} for path in commit.files]
        about = {"id": repository.name, "sha": commit.id, "private": repository.private, "siblings": siblings}
        return Answer.of(about | {"tags": [], "downloads": 0, "likes": 0})

    def _preupload(self, repository: Repository, revision: str, wanted: dict[str, Any]) -> Answer:
        if len(wanted["files"]) > 256:
            raise RefusedError(413, "too many files")
        commit = self._commit_of(repository, revision)
        found = []
        for file in wanted["files"]:
            base64.b64decode(file["sample"], validate=True)
            is_large = bool(file["size"]) and (
                file["path"].endswith(self.lfs_extensions) or file["size"] > REGULAR_BYTES
            )
            entry = {"path": file["path"], "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
            blob = commit.files.get(file["path"])
            if blob is not None:
                entry["oid"] = blob.sha256 or blob.oid
            found.append(entry)
        return Answer.of({"files": found})

    def _branch(self, repository: Repository, branch: str, wanted: dict[str, Any]) -> Answer:
        with self.store.lock:
            if branch in repository.branches:
                raise RefusedError(409, f"Reference already exists: {branch}")
            repository.branches[branch] = self._commit_of(repository, wanted.get("startingPoint", "main")).id
        return Answer.of({})

    def _tag(self, repository: Repository, revision: str, wanted: dict[str, Any]) -> Answer:
        with self.store.lock:
            if wanted["tag"] in repository.tags:
                raise RefusedError(409, f"Tag already exists: {wanted['tag']}")
            repository.tags[wanted["tag"]] = self._commit_of(repository, revision).id
        return Answer.of({})

    def _commit(self, repository: Repository, revision: str, body: bytes, *, is_proposal: bool) -> Answer:
        lines = [json.loads(line) for line in body.splitlines() if line]
        if not lines or lines[0]["key"] != "header":
            raise RefusedError(400, "no header")
        header = lines[0]["value"]
        if self.on_before_commit is not None:
            self.on_before_commit(repository)
        with self.store.lock:
            head = self._commit_of(repository, revision)
            if revision not in {**repository.branches, **repository.proposals}:
                raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            expected = header.get("parentCommit")
            if expected and not head.id.startswith(expected) and not is_proposal and not self.ignores_parent:
                raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
            if is_proposal and expected:
                head = self._commit_of(repository, expected)
            files = dict(head.files)
            for line in lines[1:]:
                self._apply(repository, files, line["key"], line["value"])
            if self.on_commit is not None:
                files = {path: self.on_commit(path, blob) for path, blob in files.items()}
            made = repository.add(head.id, header["summary"], files)
            answer = {"commitUrl": f"{self.url}/{repository.name}/commit/{made}", "commitOid": made}
            if is_proposal:
                number = len(repository.proposals) + 1
                repository.proposals[f"refs/pr/{number}"] = made
                answer["pullRequestUrl"] = f"{self.url}/{repository.name}/discussions/{number}"
            else:
                refs = repository.branches if revision in repository.branches else repository.proposals
                refs[revision] = made
        return Answer.of(answer)

    def _apply(self, repository: Repository, files: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
        path = value["path"]
        if path.startswith("/") or {"..", ".git"} & set(path.split("/")):
            raise RefusedError(400, f"bad path {path}")
        if key == "file":
            content = base64.b64decode(value["content"], validate=True)
            if len(content) > REGULAR_BYTES:
                raise RefusedError(400, f"{path} is too large, use git-lfs")
            files[path] = Blob(size=len(content), content=content)
        elif key == "lfsFile":
            if value["oid"] not in repository.verified and value["oid"] not in self._xet_hashes():
                raise RefusedError(400, f"{path}: LFS object {value['oid']} was not uploaded")
            files[path] = Blob(size=value["size"], sha256=value["oid"])
        elif key == "deletedFile":
            if files.pop(path, None) is None:
                raise RefusedError(404, f"no entry {path}", "EntryNotFound")
        elif key == "deletedFolder":
            for inside in [name for name in files if name.startswith(path.rstrip("/") + "/")]:
                del files[inside]
        else:
            raise RefusedError(400, f"unknown operation {key}")

    # ---------------------------------------------------------------------------------------------------- large files

    def _batch(self, repository: Repository, wanted: dict[str, Any]) -> Answer:
        return Answer.of(
            {"transfer": "basic", "objects": [self._upload(repository, item) for item in wanted["objects"]]}
        )

    def _upload(self, repository: Repository, item: dict[str, Any]) -> dict[str, Any]:
        oid, size = item["oid"], item["size"]
        if oid in repository.verified:
            return {"oid": oid, "size": size}
        verify = {"href": f"{self.url}/{repository.name}/lfs-verify", "header": {}}
        if self.part_bytes is None or size <= self.part_bytes:
            return {
                "oid": oid,
                "size": size,
                "actions": {"upload": {"href": self._signed(oid, size), "header": {}}, "verify": verify},
            }
        n_parts = -(-size // self.part_bytes)
        header = {f"{k:05d}": self._signed(oid, size, k) for k in range(1, n_parts + 1)} | {
            "chunk_size": str(self.part_bytes)
        }
        done = {"href": self._signed(oid, size, 0), "header": header}
        return {"oid": oid, "size": size, "actions": {"upload": done, "verify": verify}}

    def _signed(self, oid: str, size: int, part: int | None = None) -> str:
        what = f"{oid}/{size}/{'whole' if part is None else part}"
        return f"{self.storage_url}/{what}?signature={_signature(what)}"

    def _verify(self, repository: Repository, wanted: dict[str, Any]) -> Answer:
        path = self.store.object_path(wanted["oid"])
        if not path.is_file():
            raise RefusedError(404, "no such object")
        if path.stat().st_size != wanted["size"] or sha256_of(path) != wanted["oid"]:
            raise RefusedError(422, "object is not what it should be")
        repository.verified.add(wanted["oid"])
        return Answer.of({})

    async def _storage(self, call: Call, fault: Fault | None) -> Answer:
        oid, size, part = call.parts[0], int(call.parts[1]), call.parts[2]
        if call.method in {"GET", "HEAD"}:
            return ranged(self.store.object_path(oid), call.headers.get("range"))
        if not hmac.compare_digest(call.query.get("signature", [""])[0], _signature("/".join(call.parts[:3]))):
            raise RefusedError(403, "SignatureDoesNotMatch")
        if call.method == "POST":
            return self._complete(oid, size, await call.json())
        if "content-length" not in call.headers:
            raise RefusedError(411, "MissingContentLength")
        path = self.store.folder / f"{oid}.{part}"
        etag = await receive_file(call, path)
        if part == "whole":
            self._keep(path, oid, size, corrupt=fault is not None and fault.corrupt)
        return Answer(headers={"etag": f'"{etag}"'})

    def _complete(self, oid: str, size: int, wanted: dict[str, Any]) -> Answer:
        whole = self.store.folder / f"{oid}.joined"
        numbers = [part["partNumber"] for part in wanted["parts"]]
        if numbers != list(range(1, len(numbers) + 1)):
            raise RefusedError(422, "InvalidPartOrder")
        with whole.open("wb") as stream:
            for part in wanted["parts"]:
                path = self.store.folder / f"{oid}.{part['partNumber']}"
                content = path.read_bytes() if path.is_file() else b""
                if hashlib.md5(content, usedforsecurity=False).hexdigest() != part["etag"].strip('"'):
                    raise RefusedError(422, "InvalidPart")
                stream.write(content)
        self._keep(whole, oid, size)
        return Answer.of({})

    def _keep(self, path: Path, oid: str, size: int, *, corrupt: bool = False) -> None:
        if path.stat().st_size != size or sha256_of(path) != oid:
            path.unlink()
            raise RefusedError(400, "BadDigest")
        path.replace(self.store.object_path(oid))
        if corrupt:
            content = bytearray(self.store.object_path(oid).read_bytes())
            content[len(content) // 2] ^= 1
            self.store.object_path(oid).write_bytes(content)

    def _resolve(self, repository: Repository, revision: str, path: str) -> Answer:
        commit = self._commit_of(repository, revision)
        blob = commit.files.get(path)
        if blob is None:
            raise RefusedError(404, "Entry not found", "EntryNotFound")
        headers = {"x-repo-commit": commit.id, "accept-ranges": "bytes"}
        if blob.content is not None:
            return Answer(blob.content, 200, headers | {"etag": f'"{blob.oid}"'})
        linked = {"x-linked-etag": f'"{blob.sha256}"', "x-linked-size": str(blob.size)}
        if (found := self._xet_hashes().get(str(blob.sha256))) is not None:
            route = f"{self.url}/api/models/{repository.name}/xet-read-token/{commit.id}"
            linked |= {"x-xet-hash": found, "link": f'<{route}>; rel="xet-auth"'}
        return Answer(b"", 302, headers | linked | {"location": f"{self.storage_url}/{blob.sha256}/{blob.size}/whole"})


def _signature(what: str) -> str:
    return hmac.new(KEY, what.encode(), hashlib.sha256).hexdigest()


def _log(commit: Any) -> dict[str, Any]:
    when = "2026-01-01T00:00:00.000Z"
    return {"id": commit.id, "title": commit.title, "message": "", "authors": [{"user": "me"}], "date": when}


def _refs(repository: Repository, *, with_proposals: bool) -> dict[str, Any]:
    branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in repository.branches.items()]
    tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": c} for n, c in repository.tags.items()]
    found = {"branches": branches, "tags": tags, "converts": []}
    if with_proposals:
        found["pullRequests"] = [
            {"name": ref.removeprefix("refs/"), "ref": ref, "targetCommit": c}
            for ref, c in repository.proposals.items()
        ]
    return found


def _validate(wanted: dict[str, Any]) -> Answer:
    """The card's metadata must be YAML, and a mapping."""
    parts = wanted["content"].split("---\n", 2)
    try:
        found = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0] else {}
    except yaml.YAMLError as error:
        found = error
    if not isinstance(found, dict):
        raise RefusedError(
            400, "Invalid metadata", body={"errors": [{"message": f"bad YAML: {found}"}], "warnings": []}
        )
    return Answer.of({"errors": [], "warnings": []})


@contextmanager
def serving(folder: Path, **options: Any) -> Iterator[Hub]:
    """Run a hub and its storage until the block ends."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = options.pop(
        "tokens", {"hf_writer": ("me", "write"), "hf_reader": ("me", "read"), "hf_other": ("other", "write")}
    )
    hub = Hub(store=Store(folder), tokens=tokens, **options)
    sockets = [_bound("127.0.0.1"), _bound("127.0.0.2")]
    hub.url, hub.storage_url = (f"http://{s.getsockname()[0]}:{s.getsockname()[1]}" for s in sockets)
    servers = []
    for k, sock in enumerate(sockets):
        config = uvicorn.Config(hub.app(is_storage=bool(k)), log_level="critical", lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        servers.append((server, thread))
    while not all(server.started for server, _ in servers):
        time.sleep(0.01)
    try:
        yield hub
    finally:
        for server, thread in servers:
            server.should_exit = server.force_exit = True
            thread.join(10)


def _bound(host: str) -> socket.socket:
    sock = socket.socket(proto=socket.IPPROTO_TCP)  # else asyncio leaves small answers waiting for 40 ms
    sock.bind((host, 0))
    return sock
