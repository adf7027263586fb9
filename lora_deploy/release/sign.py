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


def sign(root: Path, digests: Mapping[str, str], key: Path) -> None:
    """Sign the files of ``root``, given their sha256 by path; the private key is elliptic, in PEM.

    Raises:
        RecipeError: The key cannot be read.
        ReleaseError: model-signing is not installed.
    """
    signing = _library("signing")
    if not key.is_file():
        raise RecipeError(f"--sign-key {key}: no such file")
    try:
        config = signing.Config().use_elliptic_key_signer(private_key=key)
    except (ValueError, TypeError, OSError) as error:
        raise RecipeError(f"--sign-key {key}: is no private elliptic key that can be read: {error}") from error
    config.set_hashing_config(_KnownDigests(digests)).sign(root, root / SIGNATURE_NAME)


def check_signature(root: Path, public_key: Path) -> None:
    """Check the signature of a release against the files as they are now.

    Raises:
        SignatureError: There is none, or it is not of these files by this key.
        ReleaseError: model-signing is not installed.
    """
    verifying = _library("verifying")
    if not (root / SIGNATURE_NAME).is_file():
        raise SignatureError(f"{root}: has no {SIGNATURE_NAME}", hint="sign it with lora-deploy release --sign-key")
    if not public_key.is_file():
        raise RecipeError(f"--public-key {public_key}: no such file")
    try:
        verifying.Config().use_elliptic_key_verifier(public_key=public_key).verify(root, root / SIGNATURE_NAME)
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
