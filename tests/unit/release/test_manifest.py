"""The manifest names every file, and believes none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_deploy.errors import DigestMismatchError, InputError, LoraDeployError, ReleaseError, UnsafeFileError
from lora_deploy.release.manifest import MANIFEST_NAME, check, read_manifest
from tests.hubs.releases import FILES, make_release


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_release(tmp_path / "release")


def test_a_sound_release_passes(root: Path) -> None:
    assert {file.path for file in check(root).files} == set(FILES)


def test_text_and_reading_are_inverse(root: Path) -> None:
    assert read_manifest(root).text() == (root / MANIFEST_NAME).read_text()


def test_evidence_is_no_part_of_the_content_digest(root: Path, tmp_path: Path) -> None:
    other = make_release(tmp_path / "other", {**FILES, "README.md": b"another card"})
    assert read_manifest(other).content.digest == read_manifest(root).content.digest
    third = make_release(tmp_path / "third", {**FILES, "config.json": b"{}"})
    assert read_manifest(third).content.digest != read_manifest(root).content.digest


def test_what_hubs_leave_behind_is_ignored(root: Path) -> None:
    (root / ".gitattributes").write_text("* text")
    (root / ".cache" / "huggingface").mkdir(parents=True)
    (root / ".cache" / "huggingface" / "x.lock").write_text("")
    check(root)
    (root / ".cache" / "other").write_text("")
    with pytest.raises(ReleaseError, match=r"\.cache/other"):
        check(root)


def _flip(root: Path) -> None:
    path = root / "config.json"
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)


def _link(root: Path) -> None:
    (root / "config.json").rename(root.parent / "config.json")
    (root / "config.json").symlink_to(root.parent / "config.json")


def _link_folder(root: Path) -> None:
    (root / "onnx").rename(root.parent / "onnx")
    (root / "onnx").symlink_to(root.parent / "onnx")


@pytest.mark.parametrize(
    ("spoil", "error", "match"),
    [
        (_flip, DigestMismatchError, "config.json: found sha256"),
        (lambda root: (root / "config.json").write_text("{}"), DigestMismatchError, "found 2 bytes"),
        (lambda root: (root / "config.json").unlink(), ReleaseError, "config.json: is missing"),
        (lambda root: (root / "extra").write_text(""), ReleaseError, "extra: is in the folder"),
        (_link, UnsafeFileError, "is a link"),
        (_link_folder, UnsafeFileError, "is a link"),
        (lambda root: (root / MANIFEST_NAME).unlink(), InputError, f"has no {MANIFEST_NAME}"),
        (lambda root: (root / MANIFEST_NAME).write_text("{"), InputError, "JSON"),
        (lambda root: (root / MANIFEST_NAME).write_text("[]"), InputError, "object"),
    ],
)
def test_a_spoilt_release_is_named(
    root: Path, spoil: Callable[[Path], object], error: type[LoraDeployError], match: str
) -> None:
    spoil(root)
    with pytest.raises(error, match=match):
        check(root)


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda m: m.update(schema=2), "found schema 2, expected 1"),
        (lambda m: m.pop("content"), "content"),
        (lambda m: m.update(more=1), "more"),
        (lambda m: m["content"]["files"][0].update(path="../x"), "leads out"),
        (lambda m: m["content"]["files"][0].update(path="/x"), "'/x' leads out"),
    ],
)
def test_a_manifest_that_is_none_is_refused(root: Path, edit: Callable[[dict], object], match: str) -> None:
    document = json.loads((root / MANIFEST_NAME).read_text())
    edit(document)
    (root / MANIFEST_NAME).write_text(json.dumps(document))
    with pytest.raises(InputError, match=match):
        check(root)
