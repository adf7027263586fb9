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
from lora_deploy.cli.tasks import share_of, task_options
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
@task_options
@click.option("--dry-run", is_flag=True, help="Plan only, write nothing: what would change and what it would take.")
@click.option("--fresh", is_flag=True, help="Replace another merge at OUT, once this one has succeeded.")
@output_options
@click.pass_obj
def merge(  # noqa: PLR0917 - options by name
    screen: Screen,
    /,
    adapters: tuple[str, ...],
    base: str | None,
    output: Path | None,
    dequantize: bool,
    dry_run: bool,
    task_index: int | None,
    task_count: int | None,
    finalize: bool,
    executor: str,
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
      lora-deploy merge runs/7 -o merged --task-index 3 --task-count 8
    """  # noqa: D301 - \b is click's mark for text that keeps its lines
    from lora_deploy import pipeline
    from lora_deploy.cli.merge_tables import show_merged, show_plan, show_task
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
    share = share_of(task_index, task_count, finalize=finalize)
    if executor == "ray" and (share is not None or finalize):
        raise click.UsageError("--executor ray shares the work itself: leave the options of tasks out")
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
    if executor == "ray":
        request = pipeline.MergeRequest(
            adapters=adapters,
            base=base,
            output=str(output),
            read_options=chosen(ReadOptions, choices),
            bind_options=chosen(BindOptions, choices),
            merge_options=chosen(MergeOptions, choices),
            dequantize=dequantize,
        )
        show_merged(screen, pipeline.merge_on_ray(request, progress=screen.progress()))
    elif share is not None:
        show_task(screen, plan, pipeline.carry_out_task(plan, output, share, progress=screen.progress()), output)
    else:
        carry_out = pipeline.finalize if finalize else pipeline.execute
        show_merged(screen, carry_out(plan, output, progress=screen.progress()))
