"""Pushes to a container registry, the real one, on loopback."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from lora_deploy.errors import (
    DigestMismatchError,
    HubUnavailableError,
    NotAuthorisedError,
    PushError,
    RecipeError,
    RevisionConflictError,
)
from lora_deploy.hubs.open import open_hub
from lora_deploy.hubs.options import PushOptions
from lora_deploy.hubs.registry_client import http_library
from lora_deploy.push import preview, pull, push
from lora_deploy.release.manifest import check
from tests.hubs.releases import FILES, make_release

OPTIONS = PushOptions()
CONFIG = """
version: 0.1
storage: {{filesystem: {{rootdirectory: {folder}}}, delete: {{enabled: true}}}}
http: {{addr: "127.0.0.1:{port}"}}
{auth}
"""


@dataclass(frozen=True)
class Running:
    host: str
    folder: Path

    @property
    def target(self) -> str:
        return f"oci://{self.host}/team/model:v1"

    def blob(self, sha256: str) -> Path:
        return self.folder / "docker/registry/v2/blobs/sha256" / sha256[:2] / sha256 / "data"


def run_registry(folder: Path, auth: str = "") -> Iterator[Running]:
    program = shutil.which("docker-registry")
    if program is None:
        pytest.skip("needs a registry: docker-registry is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder.mkdir()
    (folder / "config.yml").write_text(CONFIG.format(folder=folder, port=port, auth=auth))
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([program, "serve", str(folder / "config.yml")], stdout=log, stderr=log)
    try:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield Running(f"127.0.0.1:{port}", folder)
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Running]:
    yield from run_registry(tmp_path / "registry")


@pytest.fixture
def locked_registry(tmp_path: Path) -> Iterator[Running]:
    program = shutil.which("htpasswd")
    if program is None:
        pytest.skip("needs htpasswd")
    made = subprocess.run([program, "-Bbn", "me", "secret"], capture_output=True, text=True, check=True)
    (tmp_path / "htpasswd").write_text(made.stdout)
    auth = f"auth: {{htpasswd: {{realm: test, path: {tmp_path / 'htpasswd'}}}}}"
    yield from run_registry(tmp_path / "registry", auth)


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
    assert push(release, registry.target, OPTIONS).n_sent_bytes == 0
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
    with pytest.raises(DigestMismatchError, match=r"onnx/model\.onnx"):
        push(release, registry.target, OPTIONS)  # it has the blob by name; what comes back is another


def test_a_changed_file_is_not_pushed(registry: Running, release: Path) -> None:
    path = release / "config.json"
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(DigestMismatchError, match=r"config\.json"):
        push(release, registry.target, OPTIONS)
    with pytest.raises(PushError, match="no such tag"), open_hub(registry.target, OPTIONS) as hub:
        hub.listing()


def test_credentials(locked_registry: Running, release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    with pytest.raises(NotAuthorisedError):
        push(release, locked_registry.target, OPTIONS)
    with pytest.raises(NotAuthorisedError) as caught:
        push(release, locked_registry.target, PushOptions(token="me:wrong-secret"))
    assert "wrong-secret" not in str(caught.value)
    push(release, locked_registry.target, PushOptions(token="me:secret"))
    auths = {locked_registry.host: {"auth": "bWU6c2VjcmV0"}}
    (tmp_path / "config.json").write_text(json.dumps({"auths": auths}))
    pull(locked_registry.target, tmp_path / "back", OPTIONS)


def test_nothing_listens(release: Path) -> None:
    with pytest.raises(HubUnavailableError):
        push(release, "oci://127.0.0.1:9/team/model:v1", OPTIONS)


@pytest.mark.parametrize(
    "target", ["oci://host", "oci://host/Upper:v1", "oci://host/name:", "oci://host/name@sha256:12"]
)
def test_no_reference(target: str, release: Path) -> None:
    with pytest.raises(RecipeError):
        push(release, target, OPTIONS)


def test_a_push_needs_a_tag(registry: Running, release: Path) -> None:
    with pytest.raises(RecipeError, match="needs a tag"):
        push(release, f"oci://{registry.host}/team/model", OPTIONS)
