"""``lora-deploy export``: a merged checkpoint, or adapters and their base, in; graphs that onnxruntime runs out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_deploy.adapters.interface import ReadOptions
from lora_deploy.cli.numbers import format_size
from lora_deploy.cli.options import base_option, bind_options, chosen, output_options, read_options, work_options
from lora_deploy.cli.screen import Screen
from lora_deploy.errors import Finding, Severity
from lora_deploy.export.options import (
    DTYPE_CHOICES,
    LAYOUT_CHOICES,
    MAKER_CHOICES,
    PROVIDER_CHOICES,
    STORAGE_CHOICES,
    ExportOptions,
)
from lora_deploy.merge.options import MergeOptions

if TYPE_CHECKING:
    from lora_deploy.export.execute import Exported
    from lora_deploy.export.plan import ExportPlan


def _check_format(_: click.Context, __: click.Parameter, value: bool) -> None:
    if not value:
        raise click.UsageError("found no format, expected --onnx")


@click.command(short_help="Turn a merged checkpoint into ONNX graphs.")
@click.argument("folder", required=False, metavar="[MERGED]", type=click.Path(path_type=Path))
@click.option(
    "--onnx",
    is_flag=True,
    required=True,
    expose_value=False,
    callback=_check_format,
    help="Write ONNX graphs: the one format there is.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="OUT",
    help="Folder of the export. Default: MERGED/onnx.",
)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="ADAPTER",
    help="Export what this adapter makes of its base, without a merged checkpoint on disk. Repeatable.",
)
@base_option
@click.option(
    "--dtype",
    type=click.Choice(DTYPE_CHOICES),
    help="What the graph stores and computes in. Default: the checkpoint's own. From 16-bit weights that are merged "
    "already only the same or float32; with --adapter any.",
)
@click.option(
    "--provider",
    type=click.Choice(PROVIDER_CHOICES),
    default="cpu",
    show_default=True,
    help="Whose kernels the graph is fused for.",
)
@click.option(
    "--weights",
    "storage",
    type=click.Choice(STORAGE_CHOICES),
    default="external",
    show_default=True,
    help="external: files of their own, laid out for the graph. shared: the graphs go into MERGED and read its "
    "safetensors files where they can.",
)
@click.option(
    "--layout",
    type=click.Choice(LAYOUT_CHOICES),
    default="transformers",
    show_default=True,
    help="Who is to load it: transformers' ExportedModel, or onnxruntime-genai. Diffusion pipelines always get "
    "diffusers: the folders that optimum's pipelines read.",
)
@click.option(
    "--maker", type=click.Choice(MAKER_CHOICES), default="auto", show_default=True, help="Who makes the graph."
)
@bind_options
@read_options
@work_options
@click.option("--dry-run", is_flag=True, help="Plan only, write nothing.")
@click.option("--fresh", is_flag=True, help="Replace another export at OUT, once this one has succeeded.")
@output_options
@click.pass_obj
def export(
    screen: Screen,
    /,
    folder: Path | None,
    adapters: tuple[str, ...],
    base: str | None,
    output: Path | None,
    dequantize: bool,
    dry_run: bool,
    **choices: Any,  # noqa: ANN401 - options by name
) -> None:
    """Turn the merged checkpoint in MERGED into ONNX graphs that onnxruntime runs.

    The graph belongs to the base: it is made once, which takes minutes, and kept in the cache; every checkpoint merged
    into that base is then bound to it in seconds, through a table that says where each weight comes from.

    \b
    Examples:
      lora-deploy export 7-merged --onnx
      lora-deploy export --onnx --adapter runs/7 --base owner/name -o 7-onnx
      lora-deploy export 7-merged --onnx --weights shared
    """  # noqa: D301 - \b is click's mark for text that keeps its lines
    from lora_deploy import pipeline
    from lora_deploy.validate import BindOptions

    merge_choices = {name: value for name, value in choices.items() if name in {"device", "memory_bytes"}}
    plan = pipeline.plan_of_export(
        folder,
        adapters=adapters,
        base=base,
        read_options=chosen(ReadOptions, choices),
        bind_options=chosen(BindOptions, choices),
        merge_options=chosen(MergeOptions, merge_choices),
        export_options=chosen(ExportOptions, choices),
        dequantize=dequantize,
    )
    out = output or pipeline.default_export(plan)
    if dry_run:
        _show_plan(screen, plan, out)
        return
    _show(screen, pipeline.execute_export(plan, out, progress=screen.progress()))


def _show_plan(screen: Screen, plan: ExportPlan, out: Path) -> None:
    from lora_deploy.export.graphs import is_cached

    cached = is_cached(plan.blueprint)
    screen.publish(
        {
            "dry_run": True,
            "output": out,
            "options": plan.settings,
            "blueprint": plan.blueprint.digest,
            "is_cached": cached,
            "n_bytes": plan.n_bytes,
            "findings": plan.findings,
        }
    )
    screen.line(f"would write {out}")
    screen.fields(
        [
            ("graph", "in the cache" if cached else "to be made, which takes minutes"),
            ("weights", f"about {format_size(plan.n_bytes)}, {plan.dtype.long_name}"),
            ("for", f"{plan.options.provider}, {plan.options.layout}"),
        ]
    )
    screen.findings(plan.findings)


def _show(screen: Screen, exported: Exported) -> None:
    record = exported.record
    n_bytes = sum(file.n_bytes for file in record.artifacts)
    screen.publish(
        {
            "output": exported.root,
            "was_done": exported.was_done,
            "was_cached": exported.was_cached,
            "digest": record.digest,
            "blueprint": record.blueprint,
            "options": record.options,
            "opset": record.opset,
            "graphs": record.graphs,
            "shared_share": record.shared_share,
            "n_bytes": n_bytes,
            "artifacts": record.artifacts,
            "findings": record.findings,
        }
    )
    if exported.was_done:
        screen.line(f"{exported.root}: was exported before, with the same inputs and options; its files are intact")
    else:
        screen.line(f"exported to {exported.root}")
    made = "found in the cache" if exported.was_cached else "made and kept in the cache"
    rows = [
        ("graphs", f"{', '.join(graph.file for graph in record.graphs.values())}; {made}"),
        ("dtype", f"{record.options['dtype']}, for {record.options['provider']}"),
        ("output", f"{len(record.artifacts)} files, {format_size(n_bytes)}"),
    ]
    if record.options["storage"] == "shared":
        rows.append(("shared", f"{100 * record.shared_share:.1f} % of the weights' bytes"))
    screen.fields(rows)
    screen.findings(
        Finding(code=f.code, severity=Severity(f.severity), target=f.target, message=f.message) for f in record.findings
    )
