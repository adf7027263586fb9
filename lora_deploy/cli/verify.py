"""``lora-deploy verify``: check a merged checkpoint, whoever wrote it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lora_deploy.adapters.interface import ReadOptions
from lora_deploy.cli.options import (
    base_option,
    bind_options,
    chosen,
    latency_options,
    output_options,
    provider_option,
    read_options,
    unless_default,
    work_options,
)
from lora_deploy.cli.screen import Screen
from lora_deploy.evidence.options import VerifyOptions
from lora_deploy.evidence.verdict import Check
from lora_deploy.merge.options import MergeOptions

_CHECKS = click.Choice([check.value for check in Check])


@click.command(short_help="Check a merged checkpoint, whoever wrote it.")
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
@click.option("--only", multiple=True, type=_CHECKS, help="Make only this check. Repeatable.")
@click.option("--skip", multiple=True, type=_CHECKS, help="Leave this check out. Repeatable.")
@click.option(
    "--probes",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help='JSON lines to compare outputs on, beside random inputs: {"prompt": "…"}, {"input_ids": […]}, '
    '{"image": "file"}, {"audio": "file.wav"}; with "answer" for encoder-decoders.',
)
@click.option(
    "--layerwise",
    is_flag=True,
    help="Compare outputs layer by layer, with the memory of one; done anyway where the whole model does not fit.",
)
@click.option(
    "--public-key",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Check the signature of a release against this elliptic key (PEM) first.",
)
@click.option(
    "--certificate",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Check the signature of a release first: its certificate must descend from one of these (PEM).",
)
@provider_option
@latency_options
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
    public_key: Path | None,
    certificate: Path | None,
    dequantize: bool,
    **choices: Any,  # noqa: ANN401 - options by name
) -> None:
    """Check that the model in DIR is what its base and adapters make, and does what they do.

    DIR defaults to the current folder if it holds a merge.json, which says from what it was made, or the export.json of
    an export straight from adapter and base. Three checks:

    \b
    replay   every tensor computed again and compared with the stored bytes
    parity   the model, reloaded from disk, beside base plus unmerged adapter:
             every output within a tolerance that is measured, not chosen
    latency  the merged ONNX graph takes the time of the base's

    Graphs in DIR/onnx are checked with the rest; quantised ones in DIR/onnx-int4 and the like by what quantising costs
    beside what the adapter does.

    A check without a subject (no graphs, no architecture) is not applicable and spoils nothing. Every figure goes to
    DIR/evidence.json. Checkpoints of other tools (PEFT, mergekit …) need --adapter; there, every known order of
    rounding is accepted.

    Exits with 7 when a check fails, and with 10 when one cannot tell.
    """  # noqa: D301 - \b is click's mark for text that keeps its lines
    from lora_deploy import pipeline
    from lora_deploy.cli.evidence_tables import show_evidence
    from lora_deploy.validate import BindOptions

    if public_key is not None and certificate is not None:
        raise click.UsageError("found --public-key and --certificate, expected one of them")

    found = pipeline.verify(
        folder,
        adapters=adapters,
        base=base,
        options=chosen(VerifyOptions, choices | {name: _checks(choices[name]) for name in ("only", "skip")}),
        read_options=unless_default(chosen(ReadOptions, choices)),
        bind_options=unless_default(chosen(BindOptions, choices)),
        merge_options=chosen(MergeOptions, choices),
        dequantize=dequantize,
        public_key=public_key,
        certificate=certificate,
        progress=screen.progress(),
    )
    folder = folder or Path()
    screen.publish({"folder": folder, **found.to_json()})
    show_evidence(screen, found, folder)
    pipeline.require_pass(found, folder)


def _checks(names: tuple[str, ...]) -> tuple[Check, ...]:
    return tuple(Check(name) for name in names)
