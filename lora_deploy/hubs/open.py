"""TARGET as people write it, to a hub.

``hf://owner/name[@rev]`` or ``owner/name[@rev]``; ``oci://host/ns/name:tag``; ``s3://bucket/prefix``, ``gs://``, ``az://``;
``file:///path``, ``/path``, ``./path``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
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


_OF_REPOSITORIES = {
    "revision": "--revision",
    "private": "--private/--public",
    "create_pr": "--create-pr",
    "tag": "--tag",
    "commit_message": "--commit-message",
}


def fitting(target: str, options: PushOptions) -> PushOptions:
    """Leave out what this kind of target cannot obey: where several targets share their options."""
    scheme, _, _ = target.rpartition("://")
    is_repository = scheme == "hf" or (not scheme and not _is_local(target))
    if is_repository:
        return options
    kept = options if scheme == "oci" else replace(options, token=None)
    return replace(kept, revision=None, private=None, create_pr=False, tag=None, commit_message=None)


def _is_local(target: str) -> bool:
    return target.startswith(("/", "./", "../", "~")) or target in {".", ".."}


def _require_no_options(target: str, options: PushOptions, *, takes_token: bool) -> None:
    """Refuse options that the kind of target cannot obey, rather than pass over them.

    Raises:
        RecipeError: There is one.
    """
    for field, name in _OF_REPOSITORIES.items():
        if getattr(options, field) not in {None, False} or (field == "private" and options.private is not None):
            hint = "the tag is part of the target: oci://host/ns/name:tag" if takes_token and field == "tag" else None
            raise RecipeError(f"{target}: {name} is for repositories of a Hugging Face hub", hint=hint)
    if options.token is not None and not takes_token:
        raise RecipeError(
            f"{target}: --token is for hubs and registries", hint="stores and folders take the system's own credentials"
        )


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
        return _folder(target, Path(unquote(parts.path)), options)
    if scheme == "oci":
        from lora_deploy.hubs.oci import Registry

        _require_no_options(target, options, takes_token=True)
        return Registry(rest, options)
    if scheme in PACKAGES:
        _require_no_options(target, options, takes_token=False)
        return ObjectStore(target, options)
    if scheme in {"", "hf"}:
        if not scheme and _is_local(target):
            return _folder(target, Path(target).expanduser(), options)
        match = _ID.match(rest.removeprefix("models/") if scheme else rest)
        if match:
            if not scheme and Path(match["name"]).exists():
                raise RecipeError(
                    f"{target}: is a folder here and the form of a repository",
                    hint=f"write ./{target} or hf://{target}",
                )
            return _hugging_face(match["name"], match["revision"], options)
    raise RecipeError(f"{target}: is no target that is known", hint=_what_was_meant(target, scheme))


def _what_was_meant(target: str, scheme: str) -> str:
    if scheme in {"http", "https"}:
        return "write owner/name; HF_ENDPOINT says which hub"
    if not scheme and Path(target).exists():
        return f"a folder is written ./{target}"
    if match := re.match(r"^([\w.-]+/[\w.-]+):([\w.-]+)$", target):
        return f"a revision is written {match[1]}@{match[2]}, a container registry's tag oci://host/{match[0]}"
    return f"expected {_KNOWN}"


def _folder(target: str, path: Path, options: PushOptions) -> Hub:
    _require_no_options(target, options, takes_token=False)
    return Folder(path, options)


def _hugging_face(name: str, revision: str | None, options: PushOptions) -> Hub:
    from lora_deploy.hubs.huggingface import HuggingFace

    if revision and options.revision and unquote(revision) != options.revision:
        raise RecipeError(f"{name}: found revision {revision} in the target and {options.revision} in --revision")
    return HuggingFace(name, unquote(revision) if revision else options.revision, options)
