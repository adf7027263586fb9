"""``lora-deploy convert``: an adapter in, the same adapter in another format out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lora_deploy.adapters.interface import ReadOptions
from lora_deploy.cli.numbers import format_size
from lora_deploy.cli.options import base_option, bind_options, chosen, output_options, read_options
from lora_deploy.cli.screen import Screen
from lora_deploy.convert import TARGETS


@click.command(short_help="Write an adapter in another format.")
@click.argument("adapter")
@click.option(
    "--to",
    required=True,
    type=click.Choice([entry.name for entry in TARGETS]),
    help="; ".join(f"{entry.name}: {entry.summary}" for entry in TARGETS) + ".",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="OUT",
    help="Folder or file to write. Default: ./<adapter-name>-<format>.",
)
@base_option
@bind_options
@read_options
@output_options
@click.pass_obj
def convert(
    screen: Screen,
    /,
    adapter: str,
    to: str,
    output: Path | None,
    base: str | None,
    **choices: Any,  # noqa: ANN401
) -> None:
    """Write ADAPTER in another format: the same factors, and exactly the same scale.

    Without --base, under the adapter's own names; --base is needed where those are another library's, or where only the
    base tells which way round or in which order something lies. Low-rank changes (for PEFT, DoRA too) can be written;
    an adapter with others is refused, by their names.
    """
    from lora_deploy import pipeline
    from lora_deploy.validate.binding import BindOptions

    converted = pipeline.convert(
        adapter,
        to,
        output,
        base=base,
        read_options=chosen(ReadOptions, choices),
        bind_options=chosen(BindOptions, choices),
        dequantize=choices["dequantize"],
    )
    screen.publish(
        {
            "output": str(converted.path),
            "format": converted.format,
            "n_modules": converted.n_modules,
            "files": [
                {"path": str(file.path), "n_bytes": file.n_bytes, "sha256": file.sha256} for file in converted.artifacts
            ],
        }
    )
    size = format_size(sum(file.n_bytes for file in converted.artifacts))
    screen.line(f"{converted.path}: {converted.n_modules} modules, {size} ({converted.format})")
