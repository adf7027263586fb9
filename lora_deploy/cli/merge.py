"""``lora-deploy merge``: adapters and a base in, a merged checkpoint out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from lora_deploy.adapters.interface import ReadOptions
from lora_deploy.cli.numbers import Size
from lora_deploy.cli.options import (
    base_option,
    bind_options,
    chosen,
    output_options,
    read_options,
    work_options,
)
from lora_deploy.cli.screen import Screen
from lora_deploy.merge.options import MergeOptions


@click.command(short_help="Merge adapters into their base model.")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@base_option
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="OUT",
    help="Folder of the merged checkpoint. Default: ./<adapter-name>-merged.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float16", "bfloat16", "float32", "base"]),
    default="float16",
    show_default=True,
    help="What floating tensors are rounded to, once; base: each keeps its own, and what no update touches "
    "is copied byte for byte. float16 keeps eight times more of the update than bfloat16. A BASE that is an ONNX "
    "export keeps its own.",
)
@click.option(
    "--max-shard-size",
    "max_shard_bytes",
    type=Size(),
    default="5GB",
    show_default=True,
    metavar="SIZE",
    help="Largest weight file.",
)
@click.option(
    "--tokenizer",
    type=click.Choice(["adapter", "base"]),
    help="Whose tokenizer, chat template, processor and generation files travel. "
    "Default: the adapter's where its folder holds them, else the base's.",
)
@bind_options
@read_options
@work_options
@click.option("--dry-run", is_flag=True, help="Plan only, write nothing: what would change and what it would take.")
@click.option("--fresh", is_flag=True, help="Replace another merge at OUT, once this one has succeeded.")
@output_options
@click.pass_obj
def merge(
    screen: Screen,
    /,
    adapters: tuple[str, ...],
    base: str | None,
    output: Path | None,
    dequantize: bool,
    dry_run: bool,
    **choices: Any,  # noqa: ANN401 - options by name
) -> None:
    """Merge ADAPTER into its base: W' = W + s·B·A, the exact value rounded once, the same bytes on every machine.

    ADAPTER is a folder, a weights file or a hub id; several add up in the given order. Memory does not grow with the
    model. An interrupted merge resumes when the same command is given again; what is at OUT stays until the new one is
    complete.

    \b
    Examples:
      lora-deploy merge runs/7
      lora-deploy merge runs/7 --base owner/name@revision -o merged --dtype base
      lora-deploy merge style task --weight 0.5 --weight 1 --base ./base --dry-run
      lora-deploy merge runs/7 --base exported/model.onnx -o exported-7
    """  # noqa: D301 - \b is click's mark for text that keeps its lines
    from lora_deploy import pipeline
    from lora_deploy.cli.merge_tables import show_merged, show_plan
    from lora_deploy.validate import BindOptions

    if pipeline.is_onnx(base) and click.get_current_context().get_parameter_source("dtype") is ParameterSource.DEFAULT:
        choices["dtype"] = "base"  # a graph keeps its format
    plan = pipeline.plan(
        adapters,
        base=base,
        read_options=chosen(ReadOptions, choices),
        bind_options=chosen(BindOptions, choices),
        merge_options=chosen(MergeOptions, choices),
        dequantize=dequantize,
    )
    output = output or pipeline.default_output(plan)
    if dry_run:
        estimate = pipeline.estimate(plan, output)
        show_plan(screen, plan, output, estimate)
        if pipeline.is_done(plan, output, progress=screen.progress()):
            screen.line(f"{output} holds this merge already: nothing would be written")
        else:
            pipeline.require_disk(output, estimate.n_output_bytes)
        return
    screen.findings(plan.findings)
    screen.resumes = f"; the same command resumes {output}"
    show_merged(screen, pipeline.execute(plan, output, progress=screen.progress()))
