"""The signature of a release, ``model.sig``: OpenSSF model signing, offline, with a key or a certificate.

Promise: what is signed are the manifest's digests, with the manifest's own; no file is read twice. Any tool that speaks
OpenSSF model signing verifies it; ``verify`` does, when it is told whom to trust.
Source: model-signing 1.1, an in-toto statement in a sigstore bundle.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_deploy.errors import RecipeError, ReleaseError, SignatureError
from lora_deploy.release.manifest import SIGNATURE_NAME
from lora_deploy.release.options import ReleaseOptions

_IGNORED = (SIGNATURE_NAME, ".cache/huggingface", ".work")


class _KnownDigests:
    """Stands where the library would hash a folder: gives the digests that are known."""

    def __init__(self, digests: Mapping[str, str]) -> None:
        self._digests = digests

    def hash(self, model_path: Path, *, files_to_hash: object = None) -> Any:  # noqa: ANN401 - the library's manifest
        from model_signing import manifest
        from model_signing._hashing.hashing import Digest

        config = _library("hashing").Config().set_ignored_paths(paths=_IGNORED)
        nothing = config.hash(model_path, files_to_hash=())
        kind = manifest.SerializationType.from_args(nothing.serialization_type)
        items = [kind.new_item(name, Digest("sha256", bytes.fromhex(sha256))) for name, sha256 in self._digests.items()]
        return manifest.Manifest(nothing.model_name, items, kind)


def sign(root: Path, digests: Mapping[str, str], key: Path, certificate: Path | None = None) -> None:
    """Sign the files of ``root``, given their sha256 by path; key and certificate are elliptic, in PEM.

    ``certificate`` holds the key's own, then those of its issuers.

    Raises:
        RecipeError: The key or the certificate cannot be read.
        ReleaseError: model-signing is not installed.
    """
    config = _signer(key, certificate)
    config.set_hashing_config(_KnownDigests(digests)).sign(root, root / SIGNATURE_NAME)


def require_key(options: ReleaseOptions) -> None:
    """Find out before anything is written whether a release could be signed as is asked.

    Raises:
        RecipeError: The key or the certificate cannot be read, or there is a certificate without its key.
        ReleaseError: model-signing is not installed.
    """
    if options.sign_key is not None:
        _signer(options.sign_key, options.sign_certificate)
    elif options.sign_certificate is not None:
        raise RecipeError("--sign-certificate without --sign-key: found a certificate, expected its private key too")


def _signer(key: Path, certificate: Path | None) -> Any:  # noqa: ANN401 - the library's
    signing = _library("signing")
    for option, path in (("--sign-key", key), ("--sign-certificate", certificate)):
        if path is not None and not path.is_file():
            raise RecipeError(f"{option} {path}: no such file")
    try:
        config = signing.Config().use_elliptic_key_signer(private_key=key)
    except (ValueError, TypeError, OSError) as error:
        raise RecipeError(f"--sign-key {key}: is no private elliptic key that can be read: {error}") from error
    if certificate is None:
        return config
    try:
        return signing.Config().use_certificate_signer(
            private_key=key, signing_certificate=certificate, certificate_chain=[certificate]
        )
    except (ValueError, TypeError, OSError) as error:
        raise RecipeError(f"--sign-certificate {certificate}: is no certificate of this key: {error}") from error


def check_signature(root: Path, public_key: Path | None = None, *, certificate: Path | None = None) -> None:
    """Check the signature of a release against the files as they are now, by a public key or by trusted certificates.

    Both are in PEM; a signing certificate must descend from one in ``certificate``.

    Raises:
        SignatureError: There is none, or it is not of these files by this key.
        ReleaseError: model-signing is not installed.
    """
    verifying = _library("verifying")
    if not (root / SIGNATURE_NAME).is_file():
        raise SignatureError(f"{root}: has no {SIGNATURE_NAME}", hint="sign it with lora-deploy release --sign-key")
    for option, path in (("--public-key", public_key), ("--certificate", certificate)):
        if path is not None and not path.is_file():
            raise RecipeError(f"{option} {path}: no such file")
    try:
        config = verifying.Config()
        if certificate is not None:
            config.use_certificate_verifier(certificate_chain=[certificate])
        else:
            config.use_elliptic_key_verifier(public_key=public_key)
        config.verify(root, root / SIGNATURE_NAME)
    except Exception as error:
        reason = str(error) or "it is not by this key"
        raise SignatureError(f"{root / SIGNATURE_NAME}: does not hold: {reason}") from error


def _library(module: str) -> Any:  # noqa: ANN401 - a module
    from importlib import import_module

    try:
        return import_module(f"model_signing.{module}")
    except ImportError as error:
        hint = "pip install 'lora-deploy[sign]'"
        raise ReleaseError("signatures need model-signing", hint=hint, code="missing-package") from error
