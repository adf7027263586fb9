"""Make graphs: of merged folders, adapters and their base, a base with inputs for adapters; and let them answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from os import fspath
from pathlib import Path

from lora_deploy.adapters.interface import ReadOptions
from lora_deploy.bases import open_base
from lora_deploy.checkpoint import Checkpoint
from lora_deploy.errors import (
    RecipeError,
)
from lora_deploy.export.adapter_file import SUFFIX as ADAPTER_SUFFIX
from lora_deploy.export.adding import add_adapters, multi_lora_of
from lora_deploy.export.execute import Exported, execute_export
from lora_deploy.export.execute import default_output as default_export
from lora_deploy.export.fitting import Fit, check_file, check_fit
from lora_deploy.export.generate import Answer, answer
from lora_deploy.export.multi_lora import MultiLoraPlan, NamedAdapter, plan_multi_lora
from lora_deploy.export.options import ExportOptions
from lora_deploy.export.plan import ExportPlan, plan_export, plan_of_folder
from lora_deploy.export.record import RECORD_NAME as EXPORT_RECORD
from lora_deploy.export.sources import PlanSource, WeightSource
from lora_deploy.export.switchable import open_switchable
from lora_deploy.merge.identity import base_artifacts
from lora_deploy.merge.options import MergeOptions
from lora_deploy.merge.progress import Progress
from lora_deploy.pipeline.merging import plan, plan_binding
from lora_deploy.references import Reference, References, named_base, named_reference, read_named, several
from lora_deploy.validate import BindOptions, bind


def plan_of_export(
    folder: Reference | None = None,
    *,
    adapters: References = (),
    base: Reference | None = None,
    read_options: ReadOptions | None = None,
    bind_options: BindOptions | None = None,
    merge_options: MergeOptions | None = None,
    export_options: ExportOptions | None = None,
    dequantize: bool = False,
) -> ExportPlan:
    """Decide an export and write nothing; as ``export``.

    Raises:
        LoraDeployError: As ``export``.
    """
    options = export_options or ExportOptions()
    source: WeightSource
    if several(adapters):
        if folder is not None:
            raise RecipeError(
                f"{fspath(folder)}: found a merged folder and adapters, expected one of the two",
                hint="leave MERGED out to export what the adapters make of their base",
            )
        merge_options = replace(merge_options or MergeOptions(), dtype=options.dtype or "base")
        source = PlanSource(
            plan(
                adapters,
                base=base,
                read_options=read_options,
                bind_options=bind_options,
                merge_options=merge_options,
                dequantize=dequantize,
            )
        )
    elif base is not None:
        raise RecipeError("--base without --adapter: an export needs both, or a merged folder", hint="pass --adapter")
    else:
        return plan_of_folder(folder, options)
    return plan_export(source, options)


def export(  # noqa: PLR0913 - what merge takes, and what export takes
    folder: Reference | None = None,
    *,
    adapters: References = (),
    base: Reference | None = None,
    output: Reference | None = None,
    read_options: ReadOptions | None = None,
    bind_options: BindOptions | None = None,
    merge_options: MergeOptions | None = None,
    export_options: ExportOptions | None = None,
    dequantize: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Make ONNX graphs of a merged folder, or of adapters and their base without a merged checkpoint on disk.

    Without a folder and without adapters it is the current folder, if that holds our record. ``output`` defaults to
    ``<folder>/onnx``, or ``<folder>/onnx-int4`` and the like where weights are quantised.

    Raises:
        ExportError: The graphs cannot be made, or their weights not be explained; or an option cannot be had.
        LoraDeployError: As ``plan``.
    """
    planned = plan_of_export(
        folder,
        adapters=adapters,
        base=base,
        read_options=read_options,
        bind_options=bind_options,
        merge_options=merge_options,
        export_options=export_options,
        dequantize=dequantize,
    )
    out = Path(output) if output is not None else default_export(planned)
    return execute_export(planned, out, progress=progress)


def plan_of_multi_lora(
    adapters: References = (),
    *,
    base: Reference | None = None,
    targets: Sequence[str] = (),
    read_options: ReadOptions | None = None,
    bind_options: BindOptions | None = None,
    merge_options: MergeOptions | None = None,
    export_options: ExportOptions | None = None,
    dequantize: bool = False,
) -> MultiLoraPlan:
    """Decide an export of a base with inputs for adapters, which may be called ``NAME=PATH``, and write nothing.

    ``targets`` are patterns of further matrices that get inputs, such as ``all-linear``.

    Raises:
        LoraDeployError: As ``validate``; or an adapter cannot be switched at run time, or the plan cannot be made.
    """
    options = export_options or ExportOptions()
    checkpoint, named = _named_adapters(adapters, base, read_options, bind_options, dequantize=dequantize)
    chosen = replace(merge_options or MergeOptions(), dtype=options.dtype or "base")
    source = PlanSource(plan_binding(bind((), checkpoint), merge_options=chosen))
    return plan_multi_lora(plan_export(source, options), named, targets)


def add_to_export(
    folder: Reference,
    adapters: References,
    *,
    base: Reference | None = None,
    read_options: ReadOptions | None = None,
    bind_options: BindOptions | None = None,
    fresh: bool = False,
    dequantize: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Add adapters to an export that has inputs for them.

    Raises:
        LoraDeployError: As ``validate``; or an adapter does not fit the graphs, or its name is taken.
    """
    multi_lora_of(Path(folder))
    checkpoint, named = _named_adapters(adapters, base, read_options, bind_options, dequantize=dequantize)
    return add_adapters(Path(folder), named, base_artifacts(checkpoint, progress), fresh=fresh)


def _named_adapters(
    adapters: References,
    base: Reference | None,
    read_options: ReadOptions | None,
    bind_options: BindOptions | None,
    *,
    dequantize: bool,
) -> tuple[Checkpoint, list[NamedAdapter]]:
    """Bind every adapter to the base by itself."""
    options = bind_options or BindOptions()
    references = [named_reference(adapter) for adapter in several(adapters)]
    read = [read_named(path, read_options) for _, path in references]
    if base is None and not read:
        raise RecipeError("--multi-lora without --adapter: nothing names the base", hint="pass --base")
    named_or_given = fspath(base) if base is not None else named_base(read, dequantize=dequantize)
    checkpoint = open_base(named_or_given, dequantize=dequantize)
    if options.weights and len(options.weights) != len(read):
        raise RecipeError(f"found {len(options.weights)} weights for {len(read)} adapters")
    named = []
    for k, ((name, _), adapter) in enumerate(zip(references, read, strict=True)):
        own = replace(options, weights=options.weights[k : k + 1])
        named.append(NamedAdapter(name=name or adapter.name, binding=bind([adapter], checkpoint, own)))
    return checkpoint, named


def check_graph_fit(
    adapter: Reference,
    graph: Reference,
    *,
    read_options: ReadOptions | None = None,
    bind_options: BindOptions | None = None,
) -> Fit:
    """Check that an adapter, or a file of onnxruntime's, fits graphs with inputs for adapters.

    Raises:
        IncompatibleAdapterError: It does not; every misfit is in ``findings``.
        InputError: A file is not what it claims to be.
    """
    found = open_switchable(Path(graph))
    if Path(adapter).suffix == ADAPTER_SUFFIX:
        return check_file(Path(adapter), found)
    return check_fit(read_named(adapter, read_options), found, bind_options)


def answer_prompt(
    folder: Reference,
    prompt: str,
    *,
    max_tokens: int = 128,
    is_raw: bool = False,
    adapter: str | None = None,
    say: Callable[[str], None] | None = None,
) -> Answer:
    """Let the graphs in a folder, or in its folder ``onnx``, answer; ``say`` hears the text as it comes.

    ``adapter`` is one that the folder has under this name.

    Raises:
        InputError: There is no export.
        ExportError: It is no decoder with a tokenizer.
    """
    root = Path(folder)
    inner = root / "onnx"
    root = inner if not (root / EXPORT_RECORD).is_file() and (inner / EXPORT_RECORD).is_file() else root
    return answer(root, prompt, max_tokens=max_tokens, is_raw=is_raw, adapter=adapter, say=say)
