"""``lora-deploy verify``: replay a merged checkpoint, whoever wrote it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_deploy.adapters.interface import ReadOptions
from lora_deploy.cli.numbers import format_seconds, format_size
from lora_deploy.cli.options import (
    base_option,
    bind_options,
    chosen,
    output_options,
    read_options,
    unless_default,
    work_options,
)
from lora_deploy.cli.screen import Screen
from lora_deploy.merge.options import MergeOptions

if TYPE_CHECKING:
    from lora_deploy.evidence.replay import ReplayReport

N_SHOWN = 20


@click.command(short_help="Replay a merged checkpoint, whoever wrote it.")
@click.argument("folder", required=False, metavar="[DIR]", type=click.Path(path_type=Path))
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="ADAPTER",
    help="Adapter that was merged; repeat it for several, in their order. "
    "Default: the recorded one; it must still be the same file.",
)
@base_option
@bind_options
@read_options
@work_options
@output_options
@click.pass_obj
def verify(
    screen: Screen,
    /,
    folder: Path | None,
    adapters: tuple[str, ...],
    base: str | None,
    dequantize: bool,
    **choices: Any,  # noqa: ANN401 - options by name
) -> None:
    """Compute every tensor of the merged checkpoint in DIR again and compare it with what is stored.

    DIR defaults to the current folder if it holds a merge.json. What lora-deploy merged must match byte for byte; its
    merge.json says from what and how. Checkpoints of other tools (PEFT, mergekit …) need --adapter; there, every known
    order of rounding is accepted, and each tensor that differs is explained: not applied, wrong scale, wrong
    orientation, another tensor, missing, extra, changed.

    Exits with 7 when the checkpoint is not the merge, and with 10 when the dtype is too coarse to tell.
    """
    from lora_deploy import pipeline
    from lora_deploy.validate import BindOptions

    report = pipeline.verify(
        folder,
        adapters=adapters,
        base=base,
        read_options=unless_default(chosen(ReadOptions, choices)),
        bind_options=unless_default(chosen(BindOptions, choices)),
        merge_options=chosen(MergeOptions, choices),
        dequantize=dequantize,
        progress=screen.progress(),
    )
    folder = folder or Path()
    screen.publish({"folder": folder, **report.to_json()})
    _show(screen, report, folder)
    pipeline.require_pass(report, folder)


def _show(screen: Screen, report: ReplayReport, folder: Path) -> None:
    rate = report.n_bytes / max(report.seconds, 1e-9)
    screen.line(f"{folder}: {report.verdict.value}")
    screen.fields(
        [
            ("tolerance", report.tolerance),
            *((outcome.value, str(number)) for outcome, number in report.counts.items()),
            ("compared", f"{format_size(report.n_bytes)} in {format_seconds(report.seconds)}, {format_size(rate)}/s"),
        ]
    )
    for entry in report.faults[:N_SHOWN]:
        screen.line(f"  {entry.outcome.value:17}  {entry.name}{f': {entry.message}' if entry.message else ''}")
    if len(report.faults) > N_SHOWN:
        screen.line(f"  … and {len(report.faults) - N_SHOWN} more (--json lists all)")
