"""The stages in order: read, bind, plan, execute, replay. The only module that names them all.

    inspect   adapter ─▶ Inspection
    validate  adapters, base ─▶ Binding
    plan      adapters, base ─▶ MergePlan                 nothing is written
    merge     adapters, base ─▶ Merged                    plan, then execute
    verify    merged folder ─▶ ReplayReport               require_pass turns its verdict into an exception

ADAPTER is a folder, a file or a hub id; BASE a folder, a file or a hub id; a local path wins over a hub id of the same
name. Promise: no stage is skipped, none is run twice, and what a stage found is returned even where it is bad news.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import TypeAlias

from lora_deploy.adapter import Adapter, BaseHint
from lora_deploy.adapters.interface import ReadOptions
from lora_deploy.adapters.open import read_adapter
from lora_deploy.bases import open_base
from lora_deploy.errors import RecipeError
from lora_deploy.inspection import Inspection, inspect_adapter
from lora_deploy.merge.budget import estimate, require_disk
from lora_deploy.merge.execute import Merged, execute
from lora_deploy.merge.identity import base_artifacts
from lora_deploy.merge.options import MergeOptions
from lora_deploy.merge.plan import MergePlan, plan_merge
from lora_deploy.merge.progress import Progress
from lora_deploy.validate import Binding, BindOptions, bind

__all__ = [
    "base_artifacts",
    "default_output",
    "estimate",
    "execute",
    "inspect",
    "merge",
    "named_base",
    "plan",
    "require_disk",
    "validate",
]

Reference: TypeAlias = "str | PathLike[str]"
"""A path, or a hub id ``owner/name[@revision]``."""
References: TypeAlias = "Reference | Sequence[Reference]"


def inspect(adapter: Reference, *, read_options: ReadOptions | None = None) -> Inspection:
    """Measure an adapter without its base.

    Raises:
        InputError: The file is not an adapter that can be read.
    """
    return inspect_adapter(_read(adapter, read_options))


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
    read = [_read(adapter, read_options) for adapter in _several(adapters)]
    _check_weights(read, bind_options)
    checkpoint = open_base(fspath(base) if base is not None else named_base(read), dequantize=dequantize)
    return bind(read, checkpoint, bind_options)


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
    """Plan the merge of a binding."""
    return plan_merge(binding, merge_options or MergeOptions(), read_options=read_options)


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


def named_base(adapters: Sequence[Adapter]) -> str:
    """Find the base that adapters name or carry.

    Raises:
        RecipeError: None of them does, or they name different ones.
    """
    named = {hint: adapter for adapter in adapters if (hint := _as_reference(adapter.base_hint))}
    if len({hint.partition("@")[0] for hint in named}) > 1 or len({hint for hint in named if "@" in hint}) > 1:
        listed = ", ".join(f"{adapter.name} names {hint}" for hint, adapter in named.items())
        raise RecipeError(f"adapters were trained on different bases: {listed}", hint="choose one with --base")
    if named:
        return max(named, key=lambda hint: "@" in hint)
    carriers = {adapter.path for adapter in adapters if adapter.base_names}
    if len(carriers) == 1:
        return str(carriers.pop())
    paths = ", ".join(str(adapter.path) for adapter in adapters)
    raise RecipeError(
        f"{paths}: names no base, neither in its configuration nor in its header", hint="pass --base", code="no-base"
    )


def _as_reference(hint: BaseHint) -> str:
    if not hint.name:
        return ""
    return f"{hint.name}@{hint.revision}" if hint.revision and not Path(hint.name).exists() else hint.name


def _read(adapter: Reference, options: ReadOptions | None) -> Adapter:
    return read_adapter(Path(adapter), options)


def _several(references: References) -> Iterable[Reference]:
    return [references] if isinstance(references, str | PathLike) else references


def _check_weights(adapters: Sequence[Adapter], options: BindOptions | None) -> None:
    n_weights = len(options.weights) if options else 0
    if n_weights not in {0, len(adapters)}:
        raise RecipeError(
            f"weights: found {n_weights}, expected one for each of the {len(adapters)} adapters, or none",
            hint="give --weight once for each adapter, in their order",
        )
