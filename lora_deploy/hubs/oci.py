"""Registries of container images: a release is one artifact, in the media types of the CNCF ModelPack specification.

Promise: files are sent as blobs first, the manifest with the tag last; a tag that names another release moves only with
``--yes``. Blobs stream both ways, and every digest is checked here: a registry is not believed. Credentials come from
docker's own configuration or ``--token user:password``, and go to the registry and to the token service that it names.
Source: OCI distribution 1.1; model-spec 0.0.7.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlencode, urljoin

from lora_deploy.artifact import Artifact, sha256_of
from lora_deploy.errors import DigestMismatchError, PushError, RecipeError, RevisionConflictError
from lora_deploy.hubs.interface import Preview, Published, mismatch, require_unchanged
from lora_deploy.hubs.options import PushOptions
from lora_deploy.hubs.registry_client import RegistryClient, is_status
from lora_deploy.merge.progress import Progress, reporting

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
ARTIFACT_TYPE = "application/vnd.cncf.model.manifest.v1+json"
CONFIG_TYPE = "application/vnd.cncf.model.config.v1+json"
FILE_PATH = "org.cncf.model.filepath"
_LAYER = "application/vnd.cncf.model.{}.v1.raw"
_WEIGHTS = (".safetensors", ".onnx", ".data", ".bin", ".onnx_adapter")
_DOCUMENTS = (".md", ".html", ".txt", ".pdf")
_REFERENCE = re.compile(
    r"^(?P<host>[\w.-]+(:\d+)?)/(?P<name>[a-z0-9]+([._/-]+[a-z0-9]+)*)"
    r"(:(?P<tag>\w[\w.-]{0,127}))?(@(?P<digest>sha256:[0-9a-f]{64}))?$"
)
_CHUNK_BYTES = 1 << 20
_MAX_MANIFEST_BYTES = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    digest: str
    n_bytes: int


class Registry:
    """One tag, or one digest, of a repository in a registry."""

    def __init__(self, reference: str, options: PushOptions) -> None:
        """Ask nothing yet.

        Raises:
            RecipeError: It is no reference to an artifact.
        """
        match = _REFERENCE.match(reference)
        if match is None:
            raise RecipeError(f"oci://{reference}: expected oci://host/namespace/name:tag, in lower case")
        self._name, self._tag, self._digest = match["name"], match["tag"], match["digest"]
        self._options = options
        self._client = RegistryClient(match["host"], self._name, options.token)
        self.url = f"oci://{match['host']}/{self._name}" + (f":{self._tag}" if self._tag else "")

    def preview(self, root: Path, files: Sequence[Artifact]) -> Preview:
        """Ask which blobs are missing."""
        self._require_free(self._manifest(root, files))
        return Preview(url=self.url, to_send=tuple(f for f in files if not self._has(f"sha256:{f.sha256}")))

    def publish(self, root: Path, files: Sequence[Artifact], title: str, progress: Progress | None) -> Published:
        """Send missing blobs, then the manifest under the tag."""
        manifest = self._manifest(root, files)
        self._require_free(manifest)
        missing = [file for file in files if not self._has(f"sha256:{file.sha256}")]
        require_unchanged(root, [file for file in files if file not in missing])
        with reporting(progress, "pushing", sum(file.n_bytes for file in missing)) as advance:
            for file in missing:
                self._send_file(root, file)
                advance(file.n_bytes)
        config = _config(files)
        self._send_bytes(config)
        digest = "sha256:" + hashlib.sha256(manifest).hexdigest()
        self._client.request("PUT", f"manifests/{self._tag}", content=manifest, headers={"content-type": MANIFEST_TYPE})
        return Published(
            revision=digest, url=f"{self.url}@{digest}", n_sent_bytes=sum(file.n_bytes for file in missing)
        )

    def read_back(self, root: Path, files: Sequence[Artifact], published: Published) -> Mapping[str, str]:
        """Fetch every blob that the manifest under the digest names, and hash it."""
        layers = self._layers(published.revision or self._reference)
        found = {}
        for file in files:
            layer = layers.get(str(file.path))
            if layer is None:
                raise PushError(f"{published.url}: lacks {file.path} after the push", code="not-landed")
            digest = hashlib.sha256()
            with self._blob(layer) as pieces:
                for piece in pieces:
                    digest.update(piece)
            found[str(file.path)] = f"sha256:{digest.hexdigest()}"
        return found

    def listing(self) -> Mapping[str, int]:
        """List what the manifest names."""
        return {path: layer.n_bytes for path, layer in self._layers(self._reference).items()}

    @contextmanager
    def opened(self, path: str) -> Iterator[Iterator[bytes]]:
        """Stream a blob; the caller compares what comes with the release's manifest."""
        with self._blob(self._layers(self._reference)[path]) as pieces:
            yield pieces

    def close(self) -> None:
        """End its connections."""
        self._client.close()

    @property
    def _reference(self) -> str:
        reference = self._digest or self._tag
        if reference is None:
            raise RecipeError(f"{self.url}: names neither a tag nor a digest", hint=f"{self.url}:v1")
        return reference

    def _require_free(self, manifest: bytes) -> None:
        if self._tag is None or self._digest is not None:
            raise RecipeError(f"{self.url}: a push needs a tag, and no digest", hint=f"{self.url}:v1")
        there = self._fetched(self._tag)
        if there is not None and there != manifest and not self._options.yes:
            raise RevisionConflictError(
                f"{self.url}: the tag names another artifact, sha256:{hashlib.sha256(there).hexdigest()}",
                hint="choose another tag, or move it with --yes",
                code="tag-exists",
            )

    def _fetched(self, reference: str) -> bytes | None:
        """The manifest under a tag or digest, as the registry stores it; None where there is none."""
        try:
            answer = self._client.request("GET", f"manifests/{reference}", headers={"accept": MANIFEST_TYPE})
        except PushError as error:
            if is_status(error, 404):
                return None
            raise
        content = bytes(answer.content)
        if reference.startswith("sha256:") and f"sha256:{hashlib.sha256(content).hexdigest()}" != reference:
            raise DigestMismatchError(f"{self.url}@{reference}: the registry gave another manifest")
        return content

    def _layers(self, reference: str) -> dict[str, _Layer]:
        content = self._fetched(reference)
        if content is None:
            raise PushError(f"{self.url}: no such tag or digest: {reference}", code="not-found")
        try:
            layers = json.loads(content[:_MAX_MANIFEST_BYTES])["layers"]
            return {
                str(layer["annotations"][FILE_PATH]): _Layer(digest=str(layer["digest"]), n_bytes=int(layer["size"]))
                for layer in layers
            }
        except (ValueError, KeyError, TypeError) as error:
            raise PushError(f"{self.url}: holds no model artifact: {error}", code="not-a-model") from error

    def _has(self, digest: str) -> bool:
        try:
            self._client.request("HEAD", f"blobs/{digest}")
        except PushError as error:
            if is_status(error, 404):
                return False
            raise
        return True

    def _send_file(self, root: Path, file: Artifact) -> None:
        hashed = hashlib.sha256()

        def pieces() -> Iterator[bytes]:
            with (root / file.path).open("rb", buffering=0) as stream:
                while piece := stream.read(_CHUNK_BYTES):
                    hashed.update(piece)
                    yield piece

        try:
            self._send(f"sha256:{file.sha256}", file.n_bytes, pieces)
        except PushError:
            found = sha256_of(root / file.path)
            if found != file.sha256:
                raise mismatch(root, file, found) from None
            raise
        if hashed.hexdigest() != file.sha256:
            raise mismatch(root, file, hashed.hexdigest())

    def _send_bytes(self, content: bytes) -> None:
        digest = "sha256:" + hashlib.sha256(content).hexdigest()
        if not self._has(digest):
            self._send(digest, len(content), lambda: iter([content]))

    def _send(self, digest: str, n_bytes: int, pieces: Any) -> None:  # noqa: ANN401 - gives the content, anew each time
        begun = self._client.request("POST", "blobs/uploads/", headers={"content-length": "0"})
        place = urljoin(str(begun.url), begun.headers["location"])
        place += ("&" if "?" in place else "?") + urlencode({"digest": digest})
        headers = {"content-length": str(n_bytes), "content-type": "application/octet-stream"}
        self._client.request("PUT", place, headers=headers, content=pieces)

    @contextmanager
    def _blob(self, layer: _Layer) -> Iterator[Iterator[bytes]]:
        with self._client.stream(f"blobs/{layer.digest}") as answer:
            yield answer.iter_bytes(_CHUNK_BYTES)

    def _manifest(self, root: Path, files: Sequence[Artifact]) -> bytes:
        config = _config(files)
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "artifactType": ARTIFACT_TYPE,
            "config": {
                "mediaType": CONFIG_TYPE,
                "digest": "sha256:" + hashlib.sha256(config).hexdigest(),
                "size": len(config),
            },
            "layers": [
                {
                    "mediaType": _LAYER.format(_kind(file.path)),
                    "digest": f"sha256:{file.sha256}",
                    "size": file.n_bytes,
                    "annotations": {FILE_PATH: str(file.path)},
                }
                for file in files
            ],
        }
        return json.dumps(manifest, indent=2).encode()


def _kind(path: PurePosixPath) -> str:
    if path.suffix in _WEIGHTS:
        return "weight"
    return "doc" if path.suffix in _DOCUMENTS else "weight.config"


def _config(files: Sequence[Artifact]) -> bytes:
    """What the specification wants to know of a model; every layer is as it is, so its difference is its digest."""
    config = {
        "descriptor": {},
        "config": {},
        "modelfs": {"type": "layers", "diffIds": [f"sha256:{file.sha256}" for file in files]},
    }
    return json.dumps(config, indent=2).encode()
