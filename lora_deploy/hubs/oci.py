"""Registries of container images: a release is one artifact, in the media types of the CNCF ModelPack specification.

Promise: files are sent as blobs first, the manifest with the tag last; a tag that names another release moves only with
``--yes``. Blobs stream both ways, and every digest is checked here: a registry is not believed. Credentials come from
docker's own configuration or ``--token user:password``, and go to the registry and to the token service that it names.
Source: OCI distribution 1.1; model-spec 0.0.7.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urljoin

from lora_deploy.artifact import Artifact, sha256_of
from lora_deploy.errors import DigestMismatchError, PushError, RecipeError, RevisionConflictError
from lora_deploy.hubs.interface import Preview, Published, mismatch, require_unchanged
from lora_deploy.hubs.modelpack import MANIFEST_TYPE, Layer, format_config, format_manifest, parse_layers
from lora_deploy.hubs.options import PushOptions
from lora_deploy.hubs.registry_client import RegistryClient
from lora_deploy.merge.progress import Progress, reporting

_REFERENCE = re.compile(
    r"^(?P<host>[\w.-]+(:\d+)?)/(?P<name>[a-z0-9]+([._/-]+[a-z0-9]+)*)"
    r"(:(?P<tag>\w[\w.-]{0,127}))?(@(?P<digest>sha256:[0-9a-f]{64}))?$"
)
_CHUNK_BYTES = 1 << 20


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
        self._layers_listed: dict[str, Layer] | None = None
        named = f":{self._tag}" if self._tag else ""
        self.url = f"oci://{match['host']}/{self._name}{named}" + (f"@{self._digest}" if self._digest else "")

    def preview(self, root: Path, files: Sequence[Artifact]) -> Preview:
        """Ask which blobs are missing."""
        there = self._require_free(format_manifest(files))
        notes = () if there is None else ("the tag names this release already" if there else "the tag would move",)
        return Preview(url=self.url, to_send=self._missing(files), notes=notes)

    def publish(self, root: Path, files: Sequence[Artifact], title: str, progress: Progress | None) -> Published:
        """Send missing blobs, then the manifest under the tag."""
        manifest = format_manifest(files)
        there = self._require_free(manifest)
        missing = self._missing(files)
        require_unchanged(root, [file for file in files if file not in missing])
        digest = "sha256:" + hashlib.sha256(manifest).hexdigest()
        url = f"{self.url}@{digest}"
        if there and not missing:
            return Published(revision=digest, url=url, n_sent_bytes=0, notes=("it held this release already",))
        with reporting(progress, "pushing", sum(file.n_bytes for file in missing)) as advance:
            for file in missing:
                self._send_file(root, file)
                advance(file.n_bytes)
        self._send_bytes(format_config(files))
        self._client.request("PUT", f"manifests/{self._tag}", content=manifest, headers={"content-type": MANIFEST_TYPE})
        return Published(revision=digest, url=url, n_sent_bytes=sum(file.n_bytes for file in missing))

    def read_back(self, root: Path, files: Sequence[Artifact], published: Published) -> Mapping[str, str]:
        """Fetch every blob that the manifest under the tag names, and hash it."""
        there = self._fetched(self._reference)
        digest = "sha256:" + hashlib.sha256(there or b"").hexdigest()
        if digest != published.revision:
            raise RevisionConflictError(
                f"{self.url}: the tag is at {digest}, expected {published.revision}: somebody else moved it",
                hint="look at what it names, then push again",
                code="moved",
            )
        layers = self._layers(digest)
        found = {}
        for file in files:
            layer = layers.get(str(file.path))
            if layer is None:
                raise PushError(f"{published.url}: lacks {file.path} after the push", code="not-landed")
            with self._client.stream(f"blobs/{layer.digest}") as answer:
                hashed = hashlib.sha256()
                for piece in answer.iter_bytes(_CHUNK_BYTES):
                    hashed.update(piece)
            found[str(file.path)] = f"sha256:{hashed.hexdigest()}"
        return found

    def listing(self) -> Mapping[str, int]:
        """List what the manifest names now; blobs are then those of that one."""
        self._layers_listed = self._layers(self._reference)
        return {path: layer.n_bytes for path, layer in self._layers_listed.items()}

    @contextmanager
    def opened(self, path: str) -> Iterator[Iterator[bytes]]:
        """Stream a blob; one that has not its own digest ends in an error."""
        layers = self._layers_listed or self._layers(self._reference)
        if path not in layers:
            raise PushError(f"{self.url}: lacks {path}", code="not-found")
        layer = layers[path]
        with self._client.stream(f"blobs/{layer.digest}") as answer:
            yield self._checked(answer.iter_bytes(_CHUNK_BYTES), path, layer)

    def _checked(self, pieces: Iterator[bytes], path: str, layer: Layer) -> Iterator[bytes]:
        hashed, n_bytes = hashlib.sha256(), 0
        for piece in pieces:
            hashed.update(piece)
            n_bytes += len(piece)
            if n_bytes > layer.n_bytes:
                break
            yield piece
        found = f"sha256:{hashed.hexdigest()}"
        if found != layer.digest or n_bytes != layer.n_bytes:
            what = f"found {n_bytes} bytes, {found}, expected {layer.n_bytes} bytes, {layer.digest}"
            raise DigestMismatchError(
                f"{self.url}/{path}: {what}", hint="the registry's copy is damaged: push it again"
            )

    def close(self) -> None:
        """End its connections."""
        self._client.close()

    @property
    def _reference(self) -> str:
        reference = self._digest or self._tag
        if reference is None:
            raise RecipeError(f"{self.url}: names neither a tag nor a digest", hint=f"{self.url}:v1")
        return reference

    def _require_free(self, manifest: bytes) -> bool | None:
        """None where the tag is free, else whether it names this very release; another one needs ``--yes``."""
        if self._tag is None or self._digest is not None:
            raise RecipeError(f"{self.url}: a push needs a tag, and no digest", hint=f"oci://host/{self._name}:v1")
        there = self._fetched(self._tag)
        if there is None:
            return None
        if there != manifest and not self._options.yes:
            raise RevisionConflictError(
                f"{self.url}: the tag names another artifact, sha256:{hashlib.sha256(there).hexdigest()}",
                hint="choose another tag, or move it with --yes",
                code="tag-exists",
            )
        return there == manifest

    def _missing(self, files: Sequence[Artifact]) -> tuple[Artifact, ...]:
        return tuple(file for file in files if not self._has(f"sha256:{file.sha256}"))

    def _fetched(self, reference: str) -> bytes | None:
        """The manifest under a tag or digest, as the registry stores it; None where there is none."""
        try:
            answer = self._client.request("GET", f"manifests/{reference}", headers={"accept": MANIFEST_TYPE})
        except PushError as error:
            if error.code == "not-found":
                return None
            raise
        content = bytes(answer.content)
        if reference.startswith("sha256:") and f"sha256:{hashlib.sha256(content).hexdigest()}" != reference:
            raise DigestMismatchError(f"{self.url}@{reference}: the registry gave another manifest")
        return content

    def _layers(self, reference: str) -> dict[str, Layer]:
        content = self._fetched(reference)
        if content is None:
            raise PushError(
                f"{self.url}: no such tag or digest: {reference}", hint="check the name and the tag", code="not-found"
            )
        layers = parse_layers(content)
        if layers is None:
            raise PushError(
                f"{self.url}: is no model artifact of ModelPack, with a path for every layer", code="not-a-model"
            )
        return layers

    def _has(self, digest: str) -> bool:
        try:
            self._client.request("HEAD", f"blobs/{digest}")
        except PushError as error:
            if error.code == "not-found":
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
