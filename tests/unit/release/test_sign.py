"""A signature holds for these files and this key, and for nothing else."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from lora_deploy.errors import RecipeError, SignatureError
from lora_deploy.release.manifest import MANIFEST_NAME, SIGNATURE_NAME, read_manifest
from lora_deploy.release.options import ReleaseOptions
from lora_deploy.release.sign import check_signature, require_key, sign
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


def certify(folder: Path, name: str) -> tuple[Path, Path, Path]:
    """Make an authority and a key that it certifies: the key, its chain and the authority's certificate."""
    issuer, private = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    now = dt.datetime.now(dt.UTC)
    authority = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"{name} authority")])
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    made = []
    for holder, key, is_authority in ((authority, issuer, True), (subject, private, False)):
        usage = x509.KeyUsage(
            digital_signature=not is_authority,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            key_cert_sign=is_authority,
            crl_sign=is_authority,
            encipher_only=False,
            decipher_only=False,
        )
        builder = (
            x509.CertificateBuilder()
            .subject_name(holder)
            .issuer_name(authority)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(hours=1))
            .not_valid_after(now + dt.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
            .add_extension(usage, critical=True)
        )
        made.append(builder.sign(issuer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    secret, chain, trusted = (folder / f"{name}.{end}" for end in ("key", "chain.pem", "root.pem"))
    plain = serialization.NoEncryption()
    secret.write_bytes(private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain))
    trusted.write_bytes(made[0])
    chain.write_bytes(made[1] + made[0])
    return secret, chain, trusted


def test_a_certificate_holds_by_its_authority_and_by_no_other(tmp_path: Path) -> None:
    from lora_deploy.artifact import sha256_of

    root = make_release(tmp_path / "release")
    secret, chain, trusted = certify(tmp_path, "ours")
    names = [file.path for file in read_manifest(root).files] + [MANIFEST_NAME]
    sign(root, {name: sha256_of(root / name) for name in names}, secret, chain)
    check_signature(root, certificate=trusted)
    with pytest.raises(SignatureError):
        check_signature(root, certificate=certify(tmp_path, "theirs")[2])
    (root / "config.json").write_text("{}")
    with pytest.raises(SignatureError):
        check_signature(root, certificate=trusted)


def test_a_certificate_of_another_key_or_without_one_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (secret, chain, _), (_, other, _) = certify(tmp_path, "ours"), certify(tmp_path, "theirs")
    require_key(ReleaseOptions(sign_key=secret, sign_certificate=chain))
    for key, certificate in ((secret, other), (secret, tmp_path / "gone"), (None, chain)):
        with pytest.raises(RecipeError, match="--sign-certificate"):
            require_key(ReleaseOptions(sign_key=key, sign_certificate=certificate))
