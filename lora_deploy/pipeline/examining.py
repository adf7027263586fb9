"""Examine this machine: what is installed, what computes, where there is room, whether the hub answers.

Promise: nothing is changed, nothing is raised, and no token is read into the result.
"""

from __future__ import annotations

import os
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from platform import python_version
from urllib.parse import urlsplit, urlunsplit

import torch
from huggingface_hub import constants, get_token

import lora_deploy
from lora_deploy.artifact import cache_root
from lora_deploy.errors import LoraDeployError
from lora_deploy.export.extras import installed_version, require_onnxruntime

_SHOWN = (
    *("torch", "numpy", "safetensors", "huggingface-hub", "transformers", "peft", "diffusers"),
    *("onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "onnxruntime-genai"),
)
_BRINGS = {
    "cpu": "graphs run and are verified on the CPU; cpu or gpu, never both",
    "gpu": "graphs run and are verified on CUDA; cpu or gpu, never both",
    "fast": "large 16-bit merges on a CPU in a third of the time",
    "export": "ONNX graphs, and parity with the unmerged model",
    "genai": "graphs that onnxruntime-genai loads",
    "diffusers": "pipelines of components: merge, export, probe",
    "release": "cards and reports with plots",
    "sign": "signed releases",
    "s3": "push to s3://",
    "gs": "push to gs://",
    "az": "push to az://",
    "ray": "merges and recipes on a cluster",
}
_PATIENCE_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What tensors can be computed on."""

    name: str
    kind: str
    n_bytes: int
    """Its whole memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """A place that work fills."""

    name: str
    path: Path
    n_bytes: int | None
    """What its files take; None where there is no folder yet."""
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HubAccess:
    """Whether models can be had and pushed."""

    endpoint: str
    state: str
    """``reachable``, ``offline by HF_HUB_OFFLINE``, or why not."""
    is_reachable: bool
    has_token: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Extra:
    """An optional part of the package."""

    name: str
    brings: str
    missing: tuple[str, ...]
    """Packages of it that are not installed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """What this machine has and lacks."""

    versions: Mapping[str, str | None]
    devices: tuple[Device, ...]
    providers: tuple[str, ...]
    folders: tuple[Folder, ...]
    hub: HubAccess
    extras: tuple[Extra, ...]


def examine() -> Health:
    """Examine this machine; the hub is given five seconds to answer."""
    versions = {"lora-deploy": lora_deploy.__version__, "python": python_version()}
    return Health(
        versions=versions | {name: installed_version(name) for name in _SHOWN},
        devices=_devices(),
        providers=_providers(),
        folders=tuple(
            _folder(name, path)
            for name, path in (
                ("here", Path()),
                ("cache", cache_root()),
                ("hub cache", Path(constants.HF_HUB_CACHE)),
            )
        ),
        hub=_hub(),
        extras=_extras(),
    )


def _devices() -> tuple[Device, ...]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = [Device(name=f"{os.cpu_count()} processors", kind="cpu", n_bytes=memory)]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            found.append(Device(name=card.name, kind=f"cuda:{index}", n_bytes=card.total_memory))
    return tuple(found)


def _providers() -> tuple[str, ...]:
    try:
        return tuple(require_onnxruntime().get_available_providers())
    except LoraDeployError:
        return ()


def _folder(name: str, path: Path) -> Folder:
    path = path.expanduser().absolute()
    existing = next(place for place in (path, *path.parents) if place.is_dir())
    # The working folder may hold anything, a home with millions of files too: it is not measured.
    size = _size(path) if path.is_dir() and name != "here" else None
    return Folder(name=name, path=path, n_bytes=size, free_bytes=shutil.disk_usage(existing).free)


def _size(folder: Path) -> int:
    """Sum up files; links, of which a hub cache is full, count nothing."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                status = os.lstat(os.path.join(root, name))  # noqa: PTH118 - a cache holds very many files
            except OSError:
                continue
            total += status.st_size
    return total


def _hub() -> HubAccess:
    endpoint = _without_secrets(constants.ENDPOINT)
    state, is_reachable = _reached(endpoint)
    return HubAccess(endpoint=endpoint, state=state, is_reachable=is_reachable, has_token=_has_token())


def _has_token() -> bool:
    # A job's identity counts, and is not traded for a token only to say so.
    if os.environ.get("HF_OIDC_RESOURCE"):
        return True
    try:
        return get_token() is not None
    except OSError:
        return False


def _reached(endpoint: str) -> tuple[str, bool]:
    if constants.HF_HUB_OFFLINE:
        return "not asked, HF_HUB_OFFLINE is set", False
    if urlsplit(endpoint).scheme not in {"http", "https"}:
        return "is no address of a hub", False
    try:
        with urllib.request.urlopen(endpoint, timeout=_PATIENCE_S):  # noqa: S310 - http or https, as checked
            return "reachable", True
    except urllib.error.HTTPError as error:
        error.close()
        return f"reachable, answers {error.code}", True
    except (OSError, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        return f"not reachable: {reason}", False


def _without_secrets(address: str) -> str:
    """Leave out a user and password that an address may carry."""
    parts = urlsplit(address)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _extras() -> tuple[Extra, ...]:
    try:
        declared = requires("lora-deploy") or []
    except PackageNotFoundError:
        declared = []
    return tuple(
        Extra(name=name, brings=brings, missing=tuple(p for p in _packages(declared, name) if not installed_version(p)))
        for name, brings in _BRINGS.items()
    )


def _packages(declared: list[str], extra: str) -> list[str]:
    wanted = re.compile(rf"extra\s*==\s*['\"]{extra}['\"]")
    return [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in declared if wanted.search(line)]
