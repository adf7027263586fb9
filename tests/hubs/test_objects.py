"""Pushes to an object store: moto's server of the S3 protocol, on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from lora_deploy.errors import DigestMismatchError, PushError, RecipeError, ReleaseError, RevisionConflictError
from lora_deploy.hubs.open import open_hub
from lora_deploy.hubs.options import PushOptions
from lora_deploy.push import preview, pull, push
from lora_deploy.release.manifest import MANIFEST_NAME, check
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


def test_a_push_that_broke_off_has_no_manifest_and_resumes(
    store: Any, release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_deploy.hubs.objects import ObjectStore

    def cut(*_: object, **__: object) -> None:
        raise ConnectionError("cut")

    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "_seal", cut)
        with pytest.raises(ConnectionError):
            push(release, TARGET, OPTIONS)
    with pytest.raises(ReleaseError, match="it is no release"):
        pull(TARGET, tmp_path / "back", OPTIONS)
    receipt = push(release, TARGET, OPTIONS)
    assert receipt.n_sent_bytes == (release / MANIFEST_NAME).stat().st_size


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
    with pytest.raises(PushError):
        push(release, "s3://nothing/x", OPTIONS)


def test_what_is_not_installed_is_named(release: Path) -> None:
    with pytest.raises(RecipeError, match="gs:// needs gcsfs"):
        push(release, "gs://bucket/x", OPTIONS)
    with pytest.raises(RecipeError, match="names no bucket"):
        push(release, "s3://", OPTIONS)
