"""Pushes to an object store: moto's server of the S3 protocol, on loopback."""

from __future__ import annotations

import random
import socket
import sys
import time
import tomllib
import traceback
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, ClassVar
from urllib.request import Request, urlopen

import pytest
from fsspec.registry import _registry

from lora_deploy.errors import (
    DigestMismatchError,
    HubUnavailableError,
    NotAuthorisedError,
    PushError,
    RecipeError,
    ReleaseError,
    RevisionConflictError,
)
from lora_deploy.hubs.objects import PACKAGES
from lora_deploy.hubs.open import open_hub
from lora_deploy.hubs.options import PushOptions
from lora_deploy.push import preview, pull, push
from lora_deploy.release.manifest import MANIFEST_NAME, check
from tests.hubs.registries import serving
from tests.hubs.releases import FILES, make_release

OPTIONS = PushOptions()
TARGET = "s3://bucket/models/7"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    s3fs.S3FileSystem.clear_instance_cache()
    urlopen(Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()  # its state is the process's
    files = s3fs.S3FileSystem()
    files.mkdir("bucket")
    yield files
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_round_trip_and_again(store: Any, release: Path, tmp_path: Path) -> None:
    receipt = push(release, TARGET, OPTIONS)
    assert receipt.n_sent_bytes == receipt.n_bytes
    assert pull(TARGET, tmp_path / "back", OPTIONS) == check(release)
    assert push(release, TARGET, OPTIONS).n_sent_bytes == 0
    assert preview(release, TARGET, OPTIONS).to_send == ()


def test_another_release_is_replaced_on_request_and_whole(store: Any, release: Path, tmp_path: Path) -> None:
    push(make_release(tmp_path / "old", {"config.json": b"{}", "old.txt": b"old"}), TARGET, OPTIONS)
    with pytest.raises(RevisionConflictError, match="holds another release"):
        push(release, TARGET, OPTIONS)
    push(release, TARGET, replace(OPTIONS, yes=True))
    with open_hub(TARGET, OPTIONS) as hub:
        assert set(hub.listing()) == {*FILES, MANIFEST_NAME}


def test_somebody_elses_objects_are_left_alone(store: Any, release: Path) -> None:
    store.pipe_file("bucket/models/7/mine.txt", b"mine")
    with pytest.raises(RevisionConflictError, match=r"mine\.txt"):
        push(release, TARGET, OPTIONS)
    assert store.cat_file("bucket/models/7/mine.txt") == b"mine"


def cut(*_: object, **__: object) -> None:
    raise ConnectionError("cut")


def test_a_push_that_broke_off_has_no_manifest_and_resumes(
    store: Any, release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_deploy.hubs.objects import ObjectStore

    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "_seal", cut)
        with pytest.raises(ConnectionError):
            push(release, TARGET, OPTIONS)
    with pytest.raises(ReleaseError, match="it is no release"):
        pull(TARGET, tmp_path / "back", OPTIONS)
    receipt = push(release, TARGET, OPTIONS)
    assert receipt.n_sent_bytes == (release / MANIFEST_NAME).stat().st_size


def test_while_a_release_replaces_another_the_prefix_holds_none(
    store: Any, release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old manifest would name files that are already the new ones."""
    from lora_deploy.hubs.objects import ObjectStore

    push(make_release(tmp_path / "old", {"config.json": b"{}", "old.txt": b"old"}), TARGET, OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "_send", cut)
        with pytest.raises(ConnectionError):
            push(release, TARGET, replace(OPTIONS, yes=True))
    with pytest.raises(ReleaseError, match="it is no release"):
        pull(TARGET, tmp_path / "back", OPTIONS)
    push(release, TARGET, replace(OPTIONS, yes=True))
    assert pull(TARGET, tmp_path / "back", OPTIONS) == check(release)


def test_a_file_that_somebody_added_to_a_release(store: Any, release: Path, tmp_path: Path) -> None:
    push(release, TARGET, OPTIONS)
    store.pipe_file("bucket/models/7/mine.txt", b"mine")
    with pytest.raises(RevisionConflictError, match=r"mine\.txt"):
        push(release, TARGET, OPTIONS)
    assert store.exists("bucket/models/7/mine.txt")
    with pytest.raises(ReleaseError, match=r"mine\.txt, which its manifest does not name"):
        pull(TARGET, tmp_path / "back", OPTIONS)
    assert preview(release, TARGET, replace(OPTIONS, yes=True)).notes == ("mine.txt would be removed",)
    push(release, TARGET, replace(OPTIONS, yes=True))
    assert pull(TARGET, tmp_path / "back", OPTIONS) == check(release)


def test_a_marker_of_a_folder_is_no_file(store: Any, release: Path, tmp_path: Path) -> None:
    store.call_s3("put_object", Bucket="bucket", Key="models/7/", Body=b"")
    push(release, TARGET, OPTIONS)
    assert pull(TARGET, tmp_path / "back", OPTIONS) == check(release)


def test_an_object_larger_than_a_block_goes_in_parts(store: Any, tmp_path: Path) -> None:
    content = random.Random(0).randbytes(13 << 20)  # s3fs sends blocks of 5 MiB and more
    root = make_release(tmp_path / "large", {"model.safetensors": content, "config.json": b"{}"})
    push(root, TARGET, OPTIONS)
    pull(TARGET, tmp_path / "back", OPTIONS)
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == content
    assert push(root, TARGET, OPTIONS).n_sent_bytes == 0


def test_what_a_store_keeps_wrongly_is_found(store: Any, release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_deploy.hubs.objects import ObjectStore

    seal = ObjectStore._seal

    def rotten(self: ObjectStore, *args: Any) -> None:
        seal(self, *args)
        store.pipe_file("bucket/models/7/config.json", FILES["config.json"][::-1])

    monkeypatch.setattr(ObjectStore, "_seal", rotten)
    with pytest.raises(PushError, match=r"config\.json: the target says"):
        push(release, TARGET, OPTIONS)


def test_two_that_release_at_once(store: Any, release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_deploy.hubs.objects import ObjectStore

    seal = ObjectStore._seal

    def late(self: ObjectStore, *args: Any, **kwargs: Any) -> None:
        store.pipe_file(f"bucket/models/7/{MANIFEST_NAME}", b"theirs")
        seal(self, *args, **kwargs)

    monkeypatch.setattr(ObjectStore, "_seal", late)
    with pytest.raises(RevisionConflictError, match="meanwhile"):
        push(release, TARGET, OPTIONS)
    assert store.cat_file(f"bucket/models/7/{MANIFEST_NAME}") == b"theirs"


def test_a_corrupt_object_is_not_pulled(store: Any, release: Path, tmp_path: Path) -> None:
    push(release, TARGET, OPTIONS)
    store.pipe_file("bucket/models/7/config.json", FILES["config.json"][::-1])
    with pytest.raises(DigestMismatchError, match=r"config\.json"):
        pull(TARGET, tmp_path / "back", OPTIONS)


def test_a_changed_file_is_not_pushed(store: Any, release: Path) -> None:
    path = release / "config.json"
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(DigestMismatchError, match=r"config\.json"):
        push(release, TARGET, OPTIONS)
    assert not store.exists(f"bucket/models/7/{MANIFEST_NAME}")
    assert not store.exists("bucket/models/7/config.json")


def test_no_such_bucket(store: Any, release: Path) -> None:
    with pytest.raises(PushError) as caught:
        push(release, "s3://nothing/x", OPTIONS)
    assert caught.value.code == "not-found"


class Refusing(BaseHTTPRequestHandler):
    status: ClassVar[int]

    def refuse(self) -> None:
        body = b"<Error><Code>Refused</Code><Message>no</Message></Error>"
        self.send_response(self.status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_PUT = do_POST = refuse  # noqa: N815 - names of http.server

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def without_patience(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One try a call, and keys."""
    import s3fs

    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "verysecret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize(
    ("status", "code"), [(401, "unauthorised"), (403, "forbidden"), (404, "not-found"), (503, "hub-failed")]
)
def test_each_refusal_has_its_own_code(
    without_patience: None, release: Path, monkeypatch: pytest.MonkeyPatch, status: int, code: str
) -> None:
    Refusing.status = status
    with serving(Refusing, "127.0.0.1") as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        with pytest.raises(PushError) as caught:
            push(release, TARGET, OPTIONS)
    assert caught.value.code == code
    assert "verysecret" not in "".join(traceback.format_exception(caught.value))


def test_without_keys_nobody_pushes(without_patience: None, release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(NotAuthorisedError) as caught:
        push(release, TARGET, OPTIONS)
    assert caught.value.code == "unauthorised"
    assert "AWS_ACCESS_KEY_ID" in str(caught.value.hint)


def test_a_store_that_hangs_ends_by_our_timeout(
    without_patience: None, release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_deploy.hubs import objects

    monkeypatch.setattr(objects, "_READ_SECONDS", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        begun = time.monotonic()
        with pytest.raises(HubUnavailableError) as caught:
            push(release, TARGET, OPTIONS)
    assert caught.value.code == "timeout"
    assert time.monotonic() - begun < 14  # s3fs itself waits for 15 seconds


@pytest.mark.parametrize("scheme", ["s3", "gs", "az"])
def test_what_is_not_installed_is_named(release: Path, monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    for name, package in PACKAGES.items():
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.delitem(_registry, name, raising=False)
    with pytest.raises(RecipeError, match=f"{scheme}:// needs the package {PACKAGES[scheme]}") as caught:
        push(release, f"{scheme}://bucket/x", OPTIONS)
    assert caught.value.hint == f"pip install 'lora-deploy[{scheme}]'"
    assert caught.value.code == "missing-package"


def test_the_extras_that_are_named_exist() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    for scheme, package in PACKAGES.items():
        assert any(line.startswith(package) for line in project["optional-dependencies"][scheme])


def test_no_bucket_is_named(release: Path) -> None:
    with pytest.raises(RecipeError, match="names no bucket"):
        push(release, "s3://", OPTIONS)


def test_options_of_repositories_are_refused(release: Path) -> None:
    with pytest.raises(RecipeError, match="--tag is for repositories"):
        push(release, TARGET, replace(OPTIONS, tag="v1"))
