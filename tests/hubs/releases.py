"""Small releases, put together without a merge."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from lora_deploy.merge.record import RecordedFile
from lora_deploy.release.manifest import MANIFEST_NAME, SCHEMA, Content, EvidencePart, Manifest, ReleasedBase

FILES = {
    "README.md": b"---\nlicense: mit\n---\n# a card\n",
    "config.json": b'{"model_type": "llama"}\n',
    "model-00001-of-00002.safetensors": bytes(range(256)) * 100,
    "model-00002-of-00002.safetensors": bytes(reversed(range(256))) * 90,
    "onnx/model.onnx": b"graph" * 50,
}


def make_release(root: Path, files: dict[str, bytes] | None = None) -> Path:
    """Write files and the manifest that names them."""
    contents = FILES if files is None else files
    return write_release(root, {name: iter([content]) for name, content in contents.items()})


def write_release(root: Path, files: Mapping[str, Iterable[bytes]]) -> Path:
    """Write files from pieces, and the manifest that names them."""
    recorded = []
    for name, pieces in sorted(files.items()):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with path.open("wb") as stream:
            for piece in pieces:
                stream.write(piece)
                digest.update(piece)
        recorded.append(RecordedFile(path=name, n_bytes=path.stat().st_size, sha256=digest.hexdigest()))
    manifest = Manifest(
        schema=SCHEMA,
        name="tiny",
        content=Content(
            files=tuple(f for f in recorded if f.path != "README.md"),
            base=ReleasedBase(name="owner/base", revision=None, files=()),
            adapters=(),
            recipe=None,
            options={},
            versions={},
        ),
        evidence=EvidencePart(files=tuple(f for f in recorded if f.path == "README.md"), verdicts={"replay": "pass"}),
        accepted=(),
        findings=(),
    )
    (root / MANIFEST_NAME).write_text(manifest.text())
    return root
