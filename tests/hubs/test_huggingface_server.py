"""The hub on loopback refuses what the real one refuses: else the tests of pushes would prove nothing."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import pytest

from lora_deploy.hubs.registry_client import http_library
from tests.hubs.huggingface_server import Hub

NAME = "me/model"
CONTENT = b"weights" * 100
OID = hashlib.sha256(CONTENT).hexdigest()
WRITER = {"authorization": "Bearer hf_writer"}


class Caller:
    """Calls without a client's good manners."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.client = http_library().Client()

    def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> Any:
        return self.client.post(self.hub.url + path, json=body, headers=headers or WRITER)

    def put(self, url: str, content: bytes | Any, headers: dict[str, str] | None = None) -> Any:
        return self.client.put(url, content=content, headers=headers)

    def upload(self, size: int = len(CONTENT)) -> dict[str, Any]:
        answer = self.post(f"/{NAME}.git/info/lfs/objects/batch", {"objects": [{"oid": OID, "size": size}]})
        actions: dict[str, Any] = answer.json()["objects"][0]["actions"]["upload"]
        return actions

    def commit(
        self, *lines: dict[str, Any], header: dict[str, Any] | None = None, to: str = "main", **changes: Any
    ) -> Any:
        listed = [{"key": "header", "value": {"summary": "x"} if header is None else header}, *lines]
        body = "\n".join(json.dumps(line) for line in listed)
        settings = {"headers": {**WRITER, "content-type": "application/x-ndjson"}, **changes}
        return self.client.post(f"{self.hub.url}/api/models/{NAME}/commit/{to}", content=body, **settings)


@pytest.fixture
def caller(hub: Hub) -> Iterator[Caller]:
    found = Caller(hub)
    with found.client:
        assert found.post("/api/repos/create", {"name": "model", "organization": None}).status_code == 200
        yield found


def test_objects_are_what_they_are_called(caller: Caller) -> None:
    url = caller.upload()["href"]
    assert caller.put(url, CONTENT[::-1]).status_code == 400
    assert caller.put(url, CONTENT[:-1]).status_code == 400
    assert caller.put(url, iter([CONTENT])).status_code == 411
    assert caller.put(url.partition("?")[0], CONTENT).status_code == 403
    assert caller.put(url.replace(OID, "0" * 64), CONTENT).status_code == 403
    assert caller.put(url, CONTENT).status_code == 200


def test_parts_make_the_object_or_none(caller: Caller, hub: Hub) -> None:
    hub.part_bytes = 400
    upload = caller.upload()
    etags = [caller.put(upload["header"][f"{k:05d}"], CONTENT[(k - 1) * 400 : k * 400]).headers["etag"] for k in (1, 2)]
    parts = [{"partNumber": k, "etag": etag} for k, etag in enumerate(etags, 1)]
    assert caller.client.post(upload["href"], json={"parts": parts[::-1]}).status_code == 422
    assert caller.client.post(upload["href"], json={"parts": parts[:1]}).status_code == 400
    assert caller.client.post(upload["href"], json={"parts": [parts[0], {**parts[1], "etag": "x"}]}).status_code == 422
    assert caller.client.post(upload["href"], json={"parts": parts}).status_code == 200


def test_what_was_not_verified_is_in_no_commit(caller: Caller) -> None:
    line = {"key": "lfsFile", "value": {"path": "x.bin", "algo": "sha256", "oid": OID, "size": len(CONTENT)}}
    assert caller.commit(line).status_code == 400
    caller.put(caller.upload()["href"], CONTENT)
    assert caller.commit(line).status_code == 400
    verify = {"oid": OID, "size": len(CONTENT)}
    assert caller.post(f"/{NAME}/lfs-verify", {**verify, "size": 1}).status_code == 422
    assert caller.post(f"/{NAME}/lfs-verify", {**verify, "oid": "0" * 64}).status_code == 404
    assert caller.post(f"/{NAME}/lfs-verify", verify).status_code == 200
    assert caller.commit(line).status_code == 200


def file(path: str, content: bytes = b"x") -> dict[str, Any]:
    encoded = base64.b64encode(content).decode()
    return {"key": "file", "value": {"path": path, "content": encoded, "encoding": "base64"}}


def test_a_commit_is_refused_for_what_is_wrong_with_it(caller: Caller, hub: Hub) -> None:
    head = hub.store.repositories[NAME].branches["main"]
    for path in ("/x", "../x", ".git/x"):
        assert caller.commit(file(path)).status_code == 400
    assert caller.commit(file("x", b"0" * 10_000_001)).status_code == 400
    assert caller.commit({"key": "deletedFile", "value": {"path": "gone"}}).status_code == 404
    assert caller.commit(file("x"), headers={**WRITER, "content-type": "text/plain"}).status_code == 415
    assert caller.commit(file("x"), headers={"content-type": "application/x-ndjson"}).status_code == 401
    stale = {"summary": "x", "parentCommit": "0" * 40}
    assert caller.commit(file("x"), header=stale).status_code == 412
    assert hub.store.repositories[NAME].branches["main"] == head
    assert caller.commit(file("x"), header={"summary": "x", "parentCommit": head}).status_code == 200
    body = json.dumps(file("x"))
    headers = {**WRITER, "content-type": "application/x-ndjson"}
    url = f"{hub.url}/api/models/{NAME}/commit/main"
    assert caller.client.post(url, content=body, headers=headers).status_code == 400  # no header line
    missing = caller.commit(file("x"), to="gone")
    assert (missing.status_code, missing.headers["x-error-code"]) == (404, "RevisionNotFound")


def test_too_many_files_are_too_many(caller: Caller) -> None:
    files = [{"path": f"{k}", "sample": "", "size": 0} for k in range(257)]
    assert caller.post(f"/api/models/{NAME}/preupload/main", {"files": files}).status_code == 413


@pytest.mark.parametrize(
    ("token", "status", "code"),
    [
        ("hf_nobody", 401, None),
        (None, 401, "RepoNotFound"),
        ("hf_other", 404, "RepoNotFound"),
        ("hf_writer", 200, None),
    ],
)
def test_who_sees_a_private_repository(caller: Caller, token: str | None, status: int, code: str | None) -> None:
    headers = {"authorization": f"Bearer {token}"} if token else {}
    answer = caller.client.get(f"{caller.hub.url}/api/models/{NAME}", headers=headers)
    assert (answer.status_code, answer.headers.get("x-error-code")) == (status, code)


def test_storage_reports_who_brings_a_token(caller: Caller) -> None:
    caller.put(caller.upload()["href"], CONTENT, WRITER)
    assert caller.hub.leaks == ["Bearer hf_writer"]
    assert caller.hub.url.startswith("http://127.0.0.1:")
    assert caller.hub.storage_url.startswith("http://127.0.0.2:")
