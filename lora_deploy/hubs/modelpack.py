"""How a release looks as an artifact of the CNCF ModelPack specification: one layer a file, none packed.

Promise: the same files give the same bytes, so a tag that names them is told by comparing.
Source: model-spec 0.0.7; OCI image manifest 1.1.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from lora_deploy.artifact import Artifact

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
ARTIFACT_TYPE = "application/vnd.cncf.model.manifest.v1+json"
CONFIG_TYPE = "application/vnd.cncf.model.config.v1+json"
FILE_PATH = "org.cncf.model.filepath"
_LAYER = "application/vnd.cncf.model.{}.v1.raw"
_WEIGHTS = (".safetensors", ".onnx", ".data", ".bin", ".onnx_adapter")
_DOCUMENTS = (".md", ".html", ".txt", ".pdf")
_MAX_MANIFEST_BYTES = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A blob."""

    digest: str
    """``sha256:…``"""
    n_bytes: int


def format_manifest(files: Sequence[Artifact]) -> bytes:
    """Write the manifest."""
    config = format_config(files)
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


def format_config(files: Sequence[Artifact]) -> bytes:
    """Write what the specification wants to know of a model; a layer is as it is, so its difference is its digest."""
    config = {
        "descriptor": {},
        "config": {},
        "modelfs": {"type": "layers", "diffIds": [f"sha256:{file.sha256}" for file in files]},
    }
    return json.dumps(config, indent=2).encode()


def parse_layers(manifest: bytes) -> dict[str, Layer] | None:
    """Give the layers by path; None where it is no manifest of such an artifact."""
    if len(manifest) > _MAX_MANIFEST_BYTES:
        return None
    try:
        return {
            str(layer["annotations"][FILE_PATH]): Layer(digest=str(layer["digest"]), n_bytes=int(layer["size"]))
            for layer in json.loads(manifest)["layers"]
        }
    except (ValueError, KeyError, TypeError):
        return None


def _kind(path: PurePosixPath) -> str:
    if path.suffix in _WEIGHTS:
        return "weight"
    return "doc" if path.suffix in _DOCUMENTS else "weight.config"
