"""Pushes to a container registry, the real one, on loopback."""

from __future__ import annotations

import hashlib
import json
import socket
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from lora_deploy.errors import (
    DigestMismatchError,
    HubUnavailableError,
    PushError,
    RecipeError,
    ReleaseError,
    RevisionConflictError,
)
from lora_deploy.hubs.modelpack import MANIFEST_TYPE
from lora_deploy.hubs.oci import Registry
from lora_deploy.hubs.open import open_hub
from lora_deploy.hubs.options import PushOptions
from lora_deploy.hubs.registry_client import http_library
from lora_deploy.push import preview, pull, push
from lora_deploy.release.manifest import MANIFEST_NAME, check
from tests.hubs.registries import Running, serving
from tests.hubs.releases import FILES, make_release

OPTIONS = PushOptions()


def test_round_trip(registry: Running, release: Path, tmp_path: Path) -> None:
    receipt = push(release, registry.target, OPTIONS)
    assert receipt.n_sent_bytes == receipt.n_bytes
    assert pull(registry.target, tmp_path / "by-tag", OPTIONS) == check(release)
    pinned = f"oci://{registry.host}/team/model@{receipt.revision}"
    assert pull(pinned, tmp_path / "by-digest", OPTIONS) == check(release)
    for name in FILES:
        assert (tmp_path / "by-tag" / name).read_bytes() == (release / name).read_bytes()


def test_media_types_are_those_of_the_specification(registry: Running, release: Path) -> None:
    push(release, registry.target, OPTIONS)
    with http_library().Client() as client:
        accept = {"accept": "application/vnd.oci.image.manifest.v1+json"}
        manifest = client.get(f"http://{registry.host}/v2/team/model/manifests/v1", headers=accept).json()
    assert manifest["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    assert manifest["config"]["mediaType"] == "application/vnd.cncf.model.config.v1+json"
    kinds = {layer["annotations"]["org.cncf.model.filepath"]: layer["mediaType"] for layer in manifest["layers"]}
    assert kinds["onnx/model.onnx"] == "application/vnd.cncf.model.weight.v1.raw"
    assert kinds["config.json"] == "application/vnd.cncf.model.weight.config.v1.raw"
    assert kinds["README.md"] == "application/vnd.cncf.model.doc.v1.raw"


def test_again_sends_nothing_and_another_release_needs_a_word(registry: Running, release: Path, tmp_path: Path) -> None:
    push(release, registry.target, OPTIONS)
    again = push(release, registry.target, OPTIONS)
    assert (again.n_sent_bytes, again.notes) == (0, ("it held this release already",))
    assert preview(release, registry.target, OPTIONS).to_send == ()
    other = make_release(tmp_path / "other", {"config.json": b"{}"})
    with pytest.raises(RevisionConflictError, match="names another artifact") as caught:
        push(other, registry.target, OPTIONS)
    assert caught.value.code == "tag-exists"
    push(other, registry.target, replace(OPTIONS, yes=True))
    assert pull(registry.target, tmp_path / "back", OPTIONS) == check(other)


def test_a_blob_that_rots_in_the_registry_is_not_pulled(registry: Running, release: Path, tmp_path: Path) -> None:
    receipt = push(release, registry.target, OPTIONS)
    blob = registry.blob(receipt.digests["onnx/model.onnx"].removeprefix("sha256:"))
    blob.write_bytes(blob.read_bytes()[::-1])
    with pytest.raises(DigestMismatchError, match=r"onnx/model\.onnx"):
        pull(registry.target, tmp_path / "back", OPTIONS)
    assert not (tmp_path / "back").exists()
    blob.write_bytes(blob.read_bytes()[::-1])
    resumed = pull(registry.target, tmp_path / "back", OPTIONS)
    assert resumed == check(tmp_path / "back")
    blob.write_bytes(blob.read_bytes()[::-1])
    with pytest.raises(PushError, match=r"onnx/model\.onnx: the target says") as caught:
        push(release, registry.target, OPTIONS)  # it has the blob by name; what comes back is another
    assert caught.value.code == "digest-mismatch"


def test_a_changed_file_is_not_pushed(registry: Running, release: Path) -> None:
    path = release / "config.json"
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(DigestMismatchError, match=r"config\.json"):
        push(release, registry.target, OPTIONS)
    with pytest.raises(PushError, match="no such tag"), open_hub(registry.target, OPTIONS) as hub:
        hub.listing()


def test_a_tag_that_somebody_moves_meanwhile(
    registry: Running, release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_release(tmp_path / "other", {"config.json": b"{}"})
    read_back = Registry.read_back

    def late(self: Registry, *args: Any) -> Any:
        monkeypatch.setattr(Registry, "read_back", read_back)
        push(other, registry.target, replace(OPTIONS, yes=True))
        return read_back(self, *args)

    monkeypatch.setattr(Registry, "read_back", late)
    with pytest.raises(RevisionConflictError, match="somebody else moved it") as caught:
        push(release, registry.target, OPTIONS)
    assert caught.value.code == "moved"


def test_a_tag_that_moves_while_it_is_pulled_is_pulled_as_it_was(
    registry: Running, release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(release, registry.target, OPTIONS)
    other = make_release(tmp_path / "other", {"config.json": b"{}"})
    listing = Registry.listing

    def moved(self: Registry) -> Any:
        found = listing(self)
        push(other, registry.target, replace(OPTIONS, yes=True))
        return found

    monkeypatch.setattr(Registry, "listing", moved)
    assert pull(registry.target, tmp_path / "back", OPTIONS) == check(release)


def test_the_manifest_itself_rots_in_the_registry(registry: Running, release: Path, tmp_path: Path) -> None:
    receipt = push(release, registry.target, OPTIONS)
    blob = registry.blob(receipt.digests[MANIFEST_NAME].removeprefix("sha256:"))
    blob.write_bytes(blob.read_bytes().replace(b'"tiny"', b'"huge"'))
    with pytest.raises(DigestMismatchError, match=MANIFEST_NAME):
        pull(registry.target, tmp_path / "back", OPTIONS)


def test_a_push_that_breaks_off_names_nothing_and_resumes(
    registry: Running, release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = Registry._send_file
    sent: list[Path] = []

    def cut(self: Registry, root: Path, file: Any) -> None:
        if len(sent) == 2:
            raise HubUnavailableError("cut")
        send(self, root, file)
        sent.append(file)

    with monkeypatch.context() as patch:
        patch.setattr(Registry, "_send_file", cut)
        with pytest.raises(HubUnavailableError):
            push(release, registry.target, OPTIONS)
    with pytest.raises(PushError, match="no such tag"), open_hub(registry.target, OPTIONS) as hub:
        hub.listing()
    receipt = push(release, registry.target, OPTIONS)
    assert receipt.n_sent_bytes == receipt.n_bytes - sum(file.n_bytes for file in sent)


def test_a_registry_that_hangs_ends_by_our_timeout(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_deploy.hubs import registry_client

    monkeypatch.setattr(registry_client, "_READ_SECONDS", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(HubUnavailableError) as caught:
            push(release, f"oci://127.0.0.1:{silent.getsockname()[1]}/team/model:v1", OPTIONS)
    assert caught.value.code == "timeout"


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (403, "forbidden"),
        (404, "not-found"),
        (409, "conflict"),
        (412, "moved"),
        (429, "rate-limited"),
        (503, "hub-failed"),
    ],
)
def test_each_refusal_has_its_own_code(release: Path, status: int, code: str) -> None:
    class Refusing(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(status)
            self.send_header("content-length", "0")
            self.end_headers()

        def do_GET(self) -> None:
            self.send_response(404)
            self.send_header("content-length", "0")
            self.end_headers()

        do_HEAD = do_GET  # noqa: N815 - a name of http.server

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with serving(Refusing, "127.0.0.1") as url, pytest.raises(PushError) as caught:
        push(release, f"oci://{urlsplit(url).netloc}/team/model:v1", OPTIONS)
    assert caught.value.code == code
    assert str(status) in caught.value.message


def test_options_of_repositories_are_refused(registry: Running, release: Path) -> None:
    for options in (replace(OPTIONS, tag="v2"), replace(OPTIONS, create_pr=True), replace(OPTIONS, private=False)):
        with pytest.raises(RecipeError, match="is for repositories"):
            push(release, registry.target, options)


def test_nothing_listens(release: Path) -> None:
    with pytest.raises(HubUnavailableError):
        push(release, "oci://127.0.0.1:9/team/model:v1", OPTIONS)


@pytest.mark.parametrize(
    "target", ["oci://host", "oci://host/Upper:v1", "oci://host/name:", "oci://host/name@sha256:12"]
)
def test_no_reference(target: str, release: Path) -> None:
    with pytest.raises(RecipeError):
        push(release, target, OPTIONS)


def test_an_artifact_of_something_else(registry: Running, release: Path, tmp_path: Path) -> None:
    image = {"schemaVersion": 2, "mediaType": MANIFEST_TYPE, "layers": []}
    with open_hub(registry.target, OPTIONS) as hub:
        assert isinstance(hub, Registry)
        hub._send_bytes(b"{}")
        config = {"mediaType": "application/vnd.oci.image.config.v1+json", "size": 2}
        image["config"] = config | {"digest": "sha256:" + hashlib.sha256(b"{}").hexdigest()}
        layer = {**image["config"], "mediaType": "application/vnd.oci.image.layer.v1.tar"}
        for layers, what in (([layer], "is no model artifact"), ([], "it is no release")):
            content = json.dumps({**image, "layers": layers}).encode()
            headers = {"content-type": MANIFEST_TYPE}
            hub._client.request("PUT", "manifests/v1", content=content, headers=headers)
            with pytest.raises((PushError, ReleaseError), match=what):
                pull(registry.target, tmp_path / "back", OPTIONS)


def test_a_push_needs_a_tag(registry: Running, release: Path) -> None:
    with pytest.raises(RecipeError, match="needs a tag"):
        push(release, f"oci://{registry.host}/team/model", OPTIONS)
