"""Which merge this is: everything that decides the bytes, and nothing else.

Promise: two plans with the same identity write the same weight files. Memory, threads, device, progress and the place
of inputs and output are no part of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from lora_deploy.artifact import Artifact, cached_sha256, known_sha256
from lora_deploy.checkpoint import Checkpoint
from lora_deploy.merge.progress import Progress, reporting

if TYPE_CHECKING:
    from lora_deploy.merge.plan import MergePlan

_DECIDING = ("dtype", "max_shard_bytes")


def identify(plan: MergePlan, progress: Progress | None) -> dict[str, Any]:
    """Digest inputs and collect options; base digests come from the cache when the files are unchanged."""
    base = base_artifacts(plan.binding.checkpoint, progress)
    options = asdict(plan.options)
    drawn = sorted(finding.message for finding in plan.findings if finding.code == "drawn-again")
    identity = {
        "tool": version("lora-deploy"),
        "base": [{"path": str(file.path), "n_bytes": file.n_bytes, "sha256": file.sha256} for file in base],
        "adapters": [{"sha256": a.sha256, "config_sha256": a.config_sha256} for a in plan.binding.adapters],
        "read_options": _plain(asdict(plan.read_options)),
        "bind_options": _plain(asdict(plan.binding.options)),
        "merge_options": {name: options[name] for name in _DECIDING},
        "config": _plain(plan.config),
        "companions": {name: cached_sha256(path) for name, path in sorted(plan.companions.items())},
    }
    return identity | ({"drawn": drawn} if drawn else {})  # another release may draw other numbers for a seed


def base_artifacts(checkpoint: Checkpoint, progress: Progress | None) -> tuple[Artifact, ...]:
    """Digest a base's weight files, in its own order; digests of unchanged files come from the cache."""
    paths = [checkpoint.root / file for file in checkpoint.files]
    new = {path: path.stat().st_size for path in paths if known_sha256(path) is None}
    artifacts = []
    with reporting(progress if new else None, "hashing the base", sum(new.values())) as advance:
        for file, path in zip(checkpoint.files, paths, strict=True):
            artifacts.append(Artifact(PurePosixPath(file), path.stat().st_size, cached_sha256(path)))
            advance(new.get(path, 0))
    return tuple(artifacts)


def identity_digest(identity: Mapping[str, Any]) -> str:
    """The sha256 of the identity's canonical JSON."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def name_difference(before: str, identity: Mapping[str, Any]) -> str:
    """Say which parts of two identities differ."""
    try:
        other = json.loads(before)
        differing = [name for name in identity if other.get(name) != identity[name]]
    except (ValueError, AttributeError):
        return "its plan"
    return ", ".join(name.replace("_", " ") for name in differing) or "its plan"


def _plain(value: Any) -> Any:  # noqa: ANN401 - JSON
    return json.loads(json.dumps(value))
