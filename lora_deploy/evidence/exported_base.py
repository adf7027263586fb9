"""The base, exported as the merged model was: what merged graphs are compared with.

Promise: same maker, options, stored dtypes and edits (a head of the adapter's own, a larger vocabulary, an untied
embedding), without its deltas; weights are cast as the merge casts what it does not touch.
Where the graph is in the cache, as it is after the merged export, only weights are written; they are removed again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, overload

from lora_deploy.artifact import cache_root
from lora_deploy.checkpoint import Checkpoint
from lora_deploy.errors import ExportError, MergeError
from lora_deploy.evidence.graphs import GraphFolder, find_graphs
from lora_deploy.export.execute import execute_export
from lora_deploy.export.options import ExportOptions
from lora_deploy.export.plan import plan_export
from lora_deploy.export.record import ExportRecord
from lora_deploy.export.sources import CheckpointSource, PlanSource, WeightSource
from lora_deploy.merge.plan import MergePlan, plan_merge
from lora_deploy.merge.progress import Progress
from lora_deploy.updates.replacement import Replacement
from lora_deploy.validate import Binding

Found = TypeVar("Found")


@overload
def exported_base(
    plan: MergePlan, record: ExportRecord, progress: Progress | None = None
) -> AbstractContextManager[GraphFolder | str]: ...
@overload
def exported_base(
    plan: MergePlan, record: ExportRecord, progress: Progress | None = None, *, find: Callable[[Path], Found | None]
) -> AbstractContextManager[Found | str]: ...


@contextmanager
def exported_base(
    plan: MergePlan,
    record: ExportRecord,
    progress: Progress | None = None,
    *,
    find: Callable[[Path], Any] = find_graphs,
) -> Iterator[Any]:
    """Export the base of a merge as ``record`` says that the merged model was; give a reason where that cannot be.

    ``find`` says which graphs are in the folder.
    """

    def source() -> WeightSource:
        return PlanSource(plan_merge(_without_deltas(plan.binding), plan.options, companions=plan.companions))

    with _exported(source, "the base", record, progress, find) as found:
        yield found


@contextmanager
def exported_again(
    merged: Checkpoint, record: ExportRecord, progress: Progress | None = None
) -> Iterator[GraphFolder | str]:
    """Export a merged checkpoint as ``record`` says; give a reason where that cannot be."""

    def source() -> WeightSource:
        return CheckpointSource(merged, {})

    with _exported(source, "the merged checkpoint", record, progress) as found:
        yield found


@contextmanager
def _exported(
    source: Callable[[], WeightSource],
    what: str,
    record: ExportRecord,
    progress: Progress | None,
    find: Callable[[Path], Any] = find_graphs,
) -> Iterator[Any]:
    cache_root().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="base-", dir=cache_root()) as made:
        folder = Path(made) / "onnx"
        try:
            planned = plan_export(source(), _options(record))
            # A graph that keeps the checkpoint's layout is another one, wherever its weights are.
            is_stored = record.options["storage"] == "shared"
            planned = replace(planned, blueprint=replace(planned.blueprint, is_stored=is_stored))
            execute_export(planned, folder, progress=progress)
        except (ExportError, MergeError) as error:
            yield f"{what} cannot be exported: {error.message}"
            return
        found = find(folder)
        assert found is not None  # noqa: S101 - it was just exported
        yield found


def edited_tensors(binding: Binding) -> set[str]:
    """Tensors that the base lacks in this form: they are in its export as the adapters replace them."""
    return {name for name, source in binding.outputs.items() if source is None} | set(binding.shapes)


def _options(record: ExportRecord) -> ExportOptions:
    chosen = record.options
    quantisation = chosen.get("quantisation", {})
    return ExportOptions(
        dtype=chosen["dtype"],
        provider=chosen["provider"],
        layout=chosen["layout"],
        maker=chosen["maker"],
        quantize=quantisation.get("method"),
        block_size=quantisation.get("block_size"),
        is_symmetric=quantisation.get("is_symmetric"),
    )


def _without_deltas(binding: Binding) -> Binding:
    """The base with the same edits (law 8): of what the adapters change, only tensors that the base lacks like that."""
    edited = edited_tensors(binding)
    updates = {
        name: tuple(entry for entry in entries if isinstance(entry.update, Replacement))
        for name, entries in binding.updates.items()
        if name in edited
    }
    return replace(binding, updates=updates)
