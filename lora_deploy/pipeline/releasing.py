"""Put a release together, publish it, and fetch one back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lora_deploy.errors import InputError, RecipeError
from lora_deploy.export.record import RECORD_NAME as EXPORT_RECORD
from lora_deploy.hubs.interface import Preview
from lora_deploy.hubs.options import PushOptions
from lora_deploy.merge.progress import Progress
from lora_deploy.merge.record import (
    merged_folder,
)
from lora_deploy.push import Receipt, preview
from lora_deploy.push import pull as fetch_release
from lora_deploy.push import push as publish_release
from lora_deploy.references import Reference
from lora_deploy.release.assemble import Release, assemble
from lora_deploy.release.manifest import MANIFEST_NAME, Manifest
from lora_deploy.release.options import ReleaseOptions
from lora_deploy.release.parts import default_graphs


def release(
    folder: Reference | None = None,
    *,
    output: Reference | None = None,
    graphs: Sequence[Reference] = (),
    options: ReleaseOptions | None = None,
    progress: Progress | None = None,
) -> Release:
    """Put a merged folder, its graphs and its evidence together as a release; without a folder, the current one.

    An export straight from base and adapters is released in the same way.

    ``graphs`` defaults to the exports inside the folder, ``output`` to ``<folder>-release``.

    Raises:
        ReleaseError: A check failed, a file is not the recorded one, or the licence is unclear.
        InconclusiveError: A check is missing or cannot tell, and nobody accepted that.
        OutputExistsError: Something else is at the output.
    """
    root = merged_folder(folder, EXPORT_RECORD)
    chosen = tuple(Path(graph) for graph in graphs) or default_graphs(root)
    out = Path(output) if output is not None else default_release(root)
    return assemble(root, out, options or ReleaseOptions(), graphs=chosen, progress=progress)


def default_release(merged: Path) -> Path:
    """Name the folder that a release goes to when nobody says: beside the merged one."""
    root = merged.resolve()
    return root.with_name(f"{root.name.removesuffix('-merged')}-release")


def push(
    folder: Reference | None,
    target: str,
    *,
    options: PushOptions | None = None,
    progress: Progress | None = None,
) -> Receipt:
    """Publish the release in a folder, all or nothing; without a folder, the current one.

    Raises:
        ReleaseError: The folder is not what its manifest says.
        PushError: The target did not take it, and is as it was.
    """
    return publish_release(_release_folder(folder), target, options or PushOptions(), progress)


def preview_push(folder: Reference | None, target: str, *, options: PushOptions | None = None) -> Preview:
    """Say what a push would send; nothing is changed anywhere.

    Raises:
        LoraDeployError: As ``push``.
    """
    return preview(_release_folder(folder), target, options or PushOptions())


def pull(
    target: str, folder: Reference, *, options: PushOptions | None = None, progress: Progress | None = None
) -> Manifest:
    """Fetch a release from a target into a folder that does not exist, checking every digest.

    Raises:
        ReleaseError: What is there is not what its manifest says.
        PushError: The target does not give it.
        OutputExistsError: Something is in the way.
    """
    return fetch_release(target, Path(folder), options or PushOptions(), progress)


def _release_folder(folder: Reference | None) -> Path:
    root = Path(folder) if folder is not None else Path()
    if folder is None and not (root / MANIFEST_NAME).is_file():
        raise RecipeError(
            f"the current folder holds no {MANIFEST_NAME}", hint="name the release's folder, then the target"
        )
    if not root.is_dir():
        raise InputError(f"{root}: no such folder", hint="a release is the folder that lora-deploy release makes")
    return root
