"""``lora-deploy export``: a merged checkpoint, or adapters and their base, in; graphs that onnxruntime runs out."""

from __future__ import annotations

from collections.abc import Mapping
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
    QUANTIZE_CHOICES,
    STORAGE_CHOICES,
    ExportOptions,
)
from lora_deploy.merge.options import MergeOptions

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lora_deploy.export.execute import Exported
    from lora_deploy.export.plan import ExportPlan
    from lora_deploy.export.record import RecordedAdapter, RecordedQuantisation


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
    help="Folder of the export. Default: MERGED/onnx; MERGED/onnx-int4 for --quantize int4, and so on.",
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
    "--quantize",
    type=click.Choice(QUANTIZE_CHOICES),
    help="Store matrices in fewer bits. int4, int8-blockwise: weights only, in blocks that share a scale; "
    "int8-blockwise is nearly as exact as float16. int8: dynamic, activations too; it loses far more than "
    "int8-blockwise, and is for runtimes that want it.",
)
@click.option(
    "--block-size", type=int, metavar="N", help="Weights that share a scale: 16, 32 (default), 64, 128 or 256."
)
@click.option(
    "--symmetric/--asymmetric",
    "is_symmetric",
    default=None,
    help="Whether blocks have no zero point of their own. Default: asymmetric, slightly larger and more exact.",
)
@click.option(
    "--maker", type=click.Choice(MAKER_CHOICES), default="auto", show_default=True, help="Who makes the graph."
)
@click.option(
    "--multi-lora",
    is_flag=True,
    help="Give the base's graph inputs for adapters, and write one .onnx_adapter file for each --adapter "
    "(NAME=PATH gives it a name): nothing is merged, adapters are switched at run time.",
)
@click.option(
    "--targets",
    multiple=True,
    metavar="GLOB",
    help="With --multi-lora: inputs also for these matrices, such as '*.q_proj', so that later adapters fit; "
    "all-linear: for all but the vocabulary's. Default: what the adapters change. Repeatable.",
)
@click.option(
    "--into",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="With --multi-lora: add the adapters to this earlier export; its graphs stay as they are.",
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
      lora-deploy export --onnx --multi-lora --adapter a/7 --adapter a/8 -o many
      lora-deploy export --onnx --multi-lora --adapter a/9 --into many
      lora-deploy export 7-merged --onnx --quantize int8-blockwise
    """  # noqa: D301 - \b is click's mark for text that keeps its lines
    into = choices["into"]
    if choices["multi_lora"]:
        if folder is not None:
            raise click.UsageError("--multi-lora exports a base: found MERGED, expected --base, --adapter or both")
        if (output is None) is (into is None):
            raise click.UsageError("--multi-lora writes to one of -o OUT and --into FOLDER")
        choices |= {"adapters": adapters, "base": base, "dequantize": dequantize, "dry_run": dry_run}
        if output is not None:
            _export_many(screen, output, choices)
        else:
            _add(screen, into, choices)
        return
    if choices["targets"] or into is not None:
        raise click.UsageError("--targets and --into belong to --multi-lora")
    from lora_deploy.export.execute import default_output, execute_export

    plan = _plan(folder, adapters, base, choices, dequantize=dequantize)
    out = output or default_output(plan)
    if dry_run:
        _show_plan(screen, plan, out)
        return
    _show(screen, execute_export(plan, out, progress=screen.progress()))


def _plan(
    folder: Path | None, adapters: tuple[str, ...], base: str | None, choices: dict[str, Any], *, dequantize: bool
) -> ExportPlan:
    """Plan by the whole pipeline only what needs it: loading it takes longer than binding weights to a known graph."""
    options = chosen(ExportOptions, choices)
    if not adapters and base is None:
        from lora_deploy.export.plan import plan_of_folder

        return plan_of_folder(folder, options)

    from lora_deploy import pipeline
    from lora_deploy.validate import BindOptions

    merge_choices = {name: value for name, value in choices.items() if name in {"device", "memory_bytes"}}
    return pipeline.plan_of_export(
        folder,
        adapters=adapters,
        base=base,
        read_options=chosen(ReadOptions, choices),
        bind_options=chosen(BindOptions, choices),
        merge_options=chosen(MergeOptions, merge_choices),
        export_options=options,
        dequantize=dequantize,
    )


def _export_many(screen: Screen, output: Path, choices: Mapping[str, Any]) -> None:
    """Export a base with inputs for adapters, and the adapters beside it."""
    from lora_deploy import pipeline
    from lora_deploy.validate import BindOptions

    merge_choices = {name: value for name, value in choices.items() if name in {"device", "memory_bytes"}}
    plan = pipeline.plan_of_multi_lora(
        choices["adapters"],
        base=choices["base"],
        targets=choices["targets"],
        read_options=chosen(ReadOptions, choices),
        bind_options=chosen(BindOptions, choices),
        merge_options=chosen(MergeOptions, merge_choices),
        export_options=chosen(ExportOptions, choices),
        dequantize=choices["dequantize"],
    )
    if choices["dry_run"]:
        _show_plan(screen, plan.export, output)
        screen.fields((adapter.file, f"matrices: {len(adapter.binding.updates)}") for adapter in plan.adapters)
        return
    _show(screen, pipeline.execute_multi_lora(plan, output, progress=screen.progress()))


def _add(screen: Screen, folder: Path, choices: Mapping[str, Any]) -> None:
    """Add adapters to an export whose graphs have inputs for them."""
    from lora_deploy import pipeline
    from lora_deploy.validate import BindOptions

    if not choices["adapters"] or choices["targets"] or choices["dry_run"]:
        raise click.UsageError("--into takes --adapter, and neither --targets nor --dry-run (see validate --onnx)")
    if chosen(ExportOptions, {**choices, "fresh": False}) != ExportOptions():
        raise click.UsageError("--into: the graphs are there already; their options cannot be chosen again")
    exported = pipeline.add_to_export(
        folder,
        choices["adapters"],
        base=choices["base"],
        read_options=chosen(ReadOptions, choices),
        bind_options=chosen(BindOptions, choices),
        fresh=choices["fresh"],
        dequantize=choices["dequantize"],
        progress=screen.progress(),
    )
    _show(screen, exported)


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
            *([("quantised", f"afterwards, {plan.options.quantize}")] if plan.options.quantize else []),
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
            "quantised": record.quantised,
            "n_bytes": n_bytes,
            "artifacts": record.artifacts,
            "findings": record.findings,
            "multi_lora": record.multi_lora,
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
    if record.multi_lora is not None:
        rows.append(("inputs", f"of any rank, matrices: {len(record.multi_lora.inputs)}"))
        rows += [(name, _adapter_row(adapter)) for name, adapter in record.multi_lora.adapters.items()]
    if record.quantised is not None:
        rows += _quantised_rows(record.quantised, record.options["quantisation"]["method"])
    screen.fields(rows)
    own = [] if record.multi_lora is None else [f for a in record.multi_lora.adapters.values() for f in a.findings]
    screen.findings(
        Finding(code=f.code, severity=Severity(f.severity), target=f.target, message=f.message)
        for f in (*record.findings, *own)
    )


def _adapter_row(adapter: RecordedAdapter) -> str:
    ranks = sorted({factors.rank for factors in adapter.factors.values()})
    return f"{adapter.file}: rank {', '.join(map(str, ranks))}, matrices: {len(adapter.factors)}"


def _quantised_rows(quantised: RecordedQuantisation, method: str) -> Iterator[tuple[str, str]]:
    """What became smaller, and the largest of what did not."""
    before, after = format_size(quantised.n_bytes_before), format_size(quantised.n_bytes)
    n_quantised = sum(weight.is_quantised for weight in quantised.weights)
    yield "quantised", f"{n_quantised} of {len(quantised.weights)} weights to {method}: {before} became {after}"
    kept = [weight for weight in quantised.weights if weight.n_bytes >= weight.n_bytes_before]
    if kept:
        largest = max(kept, key=lambda weight: weight.n_bytes_before)
        size = format_size(sum(weight.n_bytes_before for weight in kept))
        yield "kept", f"{size} stay as they are; the largest is {largest.initializer}"
