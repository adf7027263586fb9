"""TARGET as people write it, to a hub.

``hf://owner/name[@rev]`` or ``owner/name[@rev]``; ``oci://host/ns/name:tag``; ``s3://bucket/prefix``, ``gs://``, ``az://``;
``file:///path``, ``/path``, ``./path``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol, runtime_checkable
from urllib.parse import unquote, urlsplit

from lora_deploy.errors import RecipeError
from lora_deploy.hubs.folder import Folder
from lora_deploy.hubs.interface import Hub
from lora_deploy.hubs.objects import PACKAGES, ObjectStore
from lora_deploy.hubs.options import PushOptions

_ID = re.compile(r"^(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[^@\s]+))?$")
_KNOWN = (
    "owner/name[@rev], hf://owner/name[@rev], oci://host/ns/name:tag, s3://bucket/prefix, "
    "gs://bucket/prefix, az://container/prefix, ./folder, /folder or file:///folder"
)


@contextmanager
def open_hub(target: str, options: PushOptions) -> Iterator[Hub]:
    """Give the hub that a target names, until the block ends; nothing is asked yet.

    Raises:
        RecipeError: The target has no known form, or two.
    """
    hub = _hub_of(target, options)
    with closing(hub) if isinstance(hub, _Closable) else nullcontext():
        yield hub


@runtime_checkable
class _Closable(Protocol):
    """A hub that holds connections."""

    def close(self) -> None:
        """End them."""
        ...


def _hub_of(target: str, options: PushOptions) -> Hub:
    """Tell hubs apart by their form.

    Raises:
        RecipeError: The target has no known form, or two.
    """
    scheme, _, rest = target.rpartition("://")
    if scheme == "file":
        parts = urlsplit(target)
        if parts.netloc not in {"", "localhost"}:
            raise RecipeError(f"{target}: names another host", hint="file:///path")
        return Folder(Path(unquote(parts.path)), options)
    if scheme == "oci":
        from lora_deploy.hubs.oci import Registry

        return Registry(rest, options)
    if scheme in PACKAGES:
        return ObjectStore(target, options)
    if scheme in {"", "hf"}:
        if not scheme and (target.startswith(("/", "./", "../", "~")) or target in {".", ".."}):
            return Folder(Path(target).expanduser(), options)
        match = _ID.match(rest.removeprefix("models/") if scheme else rest)
        if match:
            if not scheme and Path(match["name"]).exists():
                raise RecipeError(
                    f"{target}: is a folder here and the form of a repository",
                    hint=f"write ./{target} or hf://{target}",
                )
            return _hugging_face(match["name"], match["revision"], options)
    raise RecipeError(f"{target}: is no target that is known, expected {_KNOWN}")


def _hugging_face(name: str, revision: str | None, options: PushOptions) -> Hub:
    from lora_deploy.hubs.huggingface import HuggingFace

    if revision and options.revision and unquote(revision) != options.revision:
        raise RecipeError(f"{name}: found revision {revision} in the target and {options.revision} in --revision")
    return HuggingFace(name, unquote(revision) if revision else options.revision, options)
