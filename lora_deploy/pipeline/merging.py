"""Read adapters, bind them to a base, plan, and merge."""

from __future__ import annotations

from collections.abc import Sequence
from os import fspath
from pathlib import Path

from lora_deploy.adapters.interface import ReadOptions
from lora_deploy.bases import open_base
from lora_deploy.checkpoint import Checkpoint
from lora_deploy.companions import companion_files
from lora_deploy.export.existing.base import OnnxBase
from lora_deploy.export.existing.form import OnnxForm
from lora_deploy.export.existing.open import is_onnx_base, open_onnx_base
from lora_deploy.export.existing.plan import plan_existing
from lora_deploy.inspection import Inspection, inspect_adapter
from lora_deploy.merge.execute import Merged
from lora_deploy.merge.execute import execute as execute_merge
from lora_deploy.merge.form import Form
from lora_deploy.merge.options import MergeOptions
from lora_deploy.merge.plan import MergePlan, plan_merge
from lora_deploy.merge.progress import Progress
from lora_deploy.merge.tasks import Task, TaskDone
from lora_deploy.merge.tasks import carry_out_task as carry_out_merge_task
from lora_deploy.merge.tasks import finalize as finalize_merge
from lora_deploy.merge.together import Ended, Wanted
from lora_deploy.merge.together import execute_together as execute_merges
from lora_deploy.references import Reference, References, named_base, read_named, several
from lora_deploy.validate import Binding, BindOptions, bind


def inspect(adapter: Reference, *, read_options: ReadOptions | None = None) -> Inspection:
    """Measure an adapter without its base.

    Raises:
        InputError: The file is not an adapter that can be read.
    """
    return inspect_adapter(read_named(adapter, read_options))


def validate(
    adapters: References,
    *,
    base: Reference | None = None,
    read_options: ReadOptions | None = None,
    bind_options: BindOptions | None = None,
    dequantize: bool = False,
) -> Binding:
    """Bind adapters, in order, to a base; without one, to the base that they name.

    Raises:
        IncompatibleAdapterError: Some updates do not fit; all of them are in ``findings``.
        InputError: A file is not what it claims to be.
        RecipeError: No base is named, or the options contradict each other.
    """
    read = [read_named(adapter, read_options) for adapter in several(adapters)]
    variant = bind_options.variant if bind_options is not None else None
    named = fspath(base) if base is not None else named_base(read, dequantize=dequantize)
    return bind(read, open_named(named, dequantize=dequantize, variant=variant), bind_options)


def is_onnx(base: Reference | None) -> bool:
    """Whether a base is an existing ONNX export: merging into it keeps its graphs."""
    return base is not None and is_onnx_base(base)


def open_named(base: str, *, dequantize: bool = False, variant: str | None = None) -> Checkpoint:
    """Open a base by what the user typed, an existing export among the rest."""
    return open_onnx_base(base) if is_onnx_base(base) else open_base(base, dequantize=dequantize, variant=variant)


def plan(
    adapters: References,
    *,
    base: Reference | None = None,
    read_options: ReadOptions | None = None,
    bind_options: BindOptions | None = None,
    merge_options: MergeOptions | None = None,
    dequantize: bool = False,
) -> MergePlan:
    """Decide every byte of a merge and write nothing.

    Raises:
        LoraDeployError: As ``validate``; or the plan cannot be made.
    """
    binding = validate(adapters, base=base, read_options=read_options, bind_options=bind_options, dequantize=dequantize)
    return plan_binding(binding, read_options=read_options, merge_options=merge_options)


def plan_binding(
    binding: Binding, *, read_options: ReadOptions | None = None, merge_options: MergeOptions | None = None
) -> MergePlan:
    """Plan the merge of a binding, with the files that travel.

    Raises:
        LoraDeployError: As ``plan``.
    """
    companions = companion_files(binding.adapters, binding.checkpoint, binding.options.tokenizer)
    if isinstance(binding.checkpoint, OnnxBase):
        own = merge_options or MergeOptions(dtype="base")
        return plan_existing(binding, own, read_options=read_options, companions=companions)
    return plan_merge(binding, merge_options or MergeOptions(), read_options=read_options, companions=companions)


def execute(planned: MergePlan, output: Path, *, progress: Progress | None = None) -> Merged:
    """Carry out a plan: a checkpoint, or the export that the base is, with merged weights.

    Raises:
        LoraDeployError: The plan cannot be carried out.
    """
    return execute_merge(planned, output, form=_form(planned), progress=progress)


def execute_together(
    wanted: Sequence[tuple[MergePlan, Path]], *, progress: Progress | None = None
) -> tuple[Ended, ...]:
    """Carry out plans for one base side by side, so that it is read once; errors are results, in the plans' order."""
    forms = [Wanted(plan=planned, out=output, form=_form(planned)) for planned, output in wanted]
    return execute_merges(forms, progress=progress)


def _form(planned: MergePlan) -> Form | None:
    return OnnxForm() if isinstance(planned.binding.checkpoint, OnnxBase) else None


def carry_out_task(planned: MergePlan, output: Path, task: Task, *, progress: Progress | None = None) -> TaskDone:
    """Write one task's share of a plan's weight files; ``finalize`` puts the whole in place.

    Raises:
        LoraDeployError: The share cannot be written.
    """
    return carry_out_merge_task(planned, output, task, form=_form(planned), progress=progress)


def finalize(planned: MergePlan, output: Path, *, progress: Progress | None = None) -> Merged:
    """Check what all tasks of a plan wrote, and put it in place.

    Raises:
        LoraDeployError: Something is missing, damaged, or in the way.
    """
    return finalize_merge(planned, output, form=_form(planned), progress=progress)


def merge(
    adapters: References,
    *,
    base: Reference | None = None,
    output: Reference | None = None,
    read_options: ReadOptions | None = None,
    bind_options: BindOptions | None = None,
    merge_options: MergeOptions | None = None,
    dequantize: bool = False,
    progress: Progress | None = None,
) -> Merged:
    """Merge adapters, in order, into a base, and write the result to a folder; resumes what was begun there.

    Raises:
        LoraDeployError: As ``plan``; or the plan cannot be carried out.
    """
    planned = plan(
        adapters,
        base=base,
        read_options=read_options,
        bind_options=bind_options,
        merge_options=merge_options,
        dequantize=dequantize,
    )
    return execute(planned, Path(output) if output is not None else default_output(planned), progress=progress)


def default_output(planned: MergePlan) -> Path:
    """Name the folder that a merge goes to when nobody says: ``<adapter-name>-merged``, here."""
    return Path("+".join(adapter.name for adapter in planned.binding.adapters) + "-merged")
