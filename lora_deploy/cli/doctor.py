"""``lora-deploy doctor``: what this machine has and lacks, before a long run finds out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

from lora_deploy.cli.numbers import format_size
from lora_deploy.cli.options import output_options
from lora_deploy.cli.screen import Screen

if TYPE_CHECKING:
    from lora_deploy.pipeline.examining import Health

_RUNTIMES = {"cpu", "gpu"}
"""Extras of which one is enough, and both are one too many."""


@click.command(short_help="Say what this machine has and lacks.")
@output_options
@click.pass_obj
def doctor(screen: Screen, /) -> None:
    """Say what this machine has and lacks: versions, devices, execution providers, disk and caches, access to the hub,
    and what each extra that is not installed would bring.

    Nothing is changed, a token is never printed, and the exit status is 0 whatever is missing.
    """  # noqa: D205 - one sentence
    from lora_deploy.pipeline.examining import examine

    health = examine()
    screen.publish(_document(health))
    _show(screen, health)


def _show(screen: Screen, health: Health) -> None:
    screen.line("versions")
    screen.fields((name, version or "not installed") for name, version in health.versions.items())
    screen.line("devices")
    screen.fields((device.name, f"{device.kind}, {format_size(device.n_bytes)}") for device in health.devices)
    screen.fields([("providers", ", ".join(health.providers) or "none: onnxruntime does not run here")])
    screen.line("disk")
    for folder in health.folders:
        used = "" if folder.n_bytes is None else f"{format_size(folder.n_bytes)} used, "
        screen.fields([(folder.name, f"{folder.path}: {used}{format_size(folder.free_bytes)} free")])
    screen.line("hub")
    hub = health.hub
    screen.fields(
        [
            ("endpoint", f"{hub.endpoint}: {hub.state}"),
            ("token", "yes" if hub.has_token else "no: public models only; hf auth login, or HF_TOKEN"),
        ]
    )
    runs_graphs = any(extra.name in _RUNTIMES and not extra.missing for extra in health.extras)
    missing = [extra for extra in health.extras if extra.missing and not (runs_graphs and extra.name in _RUNTIMES)]
    screen.line("extras that are not installed" if missing else "extras: all installed")
    screen.fields((extra.name, f"{extra.brings} (lacks {', '.join(extra.missing)})") for extra in missing)
    if missing:
        screen.line(f"hint: pip install 'lora-deploy[{missing[0].name}]'")


def _document(health: Health) -> Mapping[str, object]:
    return {
        "versions": health.versions,
        "devices": health.devices,
        "providers": health.providers,
        "folders": health.folders,
        "hub": health.hub,
        "extras": health.extras,
    }
