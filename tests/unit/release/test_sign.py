"""A signature holds for these files and this key, and for nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from lora_deploy.errors import RecipeError, SignatureError
from lora_deploy.release.manifest import MANIFEST_NAME, SIGNATURE_NAME, read_manifest
from lora_deploy.release.sign import check_signature, sign
from tests.hubs.releases import make_release


def keys(folder: Path, name: str) -> tuple[Path, Path]:
    private = ec.generate_private_key(ec.SECP256R1())
    secret, public = folder / f"{name}.pem", folder / f"{name}.pub"
    plain = serialization.NoEncryption()
    secret.write_bytes(private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain))
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(private.public_key().public_bytes(serialization.Encoding.PEM, spki))
    return secret, public


@pytest.fixture
def signed(tmp_path: Path) -> tuple[Path, Path]:
    root = make_release(tmp_path / "release")
    secret, public = keys(tmp_path, "ours")
    from lora_deploy.artifact import sha256_of

    names = [file.path for file in read_manifest(root).files] + [MANIFEST_NAME]
    sign(root, {name: sha256_of(root / name) for name in names}, secret)
    return root, public


def test_a_sound_release_holds_by_its_key(signed: tuple[Path, Path]) -> None:
    check_signature(*signed)
    (signed[0] / ".gitattributes").write_text("x")
    (signed[0] / ".cache" / "huggingface").mkdir(parents=True)
    (signed[0] / ".cache" / "huggingface" / "x").write_text("x")
    check_signature(*signed)


def test_it_does_not_hold_by_another_key(signed: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(SignatureError):
        check_signature(signed[0], keys(tmp_path, "theirs")[1])


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda root: (root / "config.json").write_text("{}"), id="changed"),
        pytest.param(lambda root: (root / "config.json").unlink(), id="missing"),
        pytest.param(lambda root: (root / "more").write_text("x"), id="extra"),
        pytest.param(lambda root: (root / MANIFEST_NAME).write_text("{}"), id="manifest"),
        pytest.param(lambda root: (root / SIGNATURE_NAME).write_text("{}"), id="signature"),
        pytest.param(lambda root: (root / SIGNATURE_NAME).unlink(), id="unsigned"),
    ],
)
def test_a_spoilt_release_does_not_hold(signed: tuple[Path, Path], spoil: Callable[[Path], object]) -> None:
    spoil(signed[0])
    with pytest.raises(SignatureError):
        check_signature(*signed)


def test_a_key_that_is_none(tmp_path: Path) -> None:
    root = make_release(tmp_path / "release")
    (tmp_path / "key").write_text("no key")
    for key in (tmp_path / "key", tmp_path / "gone"):
        with pytest.raises(RecipeError, match="--sign-key"):
            sign(root, {}, key)
