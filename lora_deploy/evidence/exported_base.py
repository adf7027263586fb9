"""The base, exported as the merged model was: what merged graphs are compared with.

Promise: same maker, options and stored dtypes; the base's weights are cast as the merge casts what it does not touch.
Where the graph is in the cache, as it is after the merged export, only weights are written; they are removed again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from lora_deploy.artifact import cache_root
from lora_deploy.errors import ExportError, MergeError
from lora_deploy.evidence.graphs import GraphFolder, find_graphs
from lora_deploy.export.execute import execute_export
from lora_deploy.export.options import ExportOptions
from lora_deploy.export.plan import plan_export
from lora_deploy.export.record import ExportRecord
from lora_deploy.export.sources import PlanSource
from lora_deploy.merge.plan import MergePlan, plan_merge
from lora_deploy.merge.progress import Progress


@contextmanager
def exported_base(
    plan: MergePlan, record: ExportRecord, progress: Progress | None = None
) -> Iterator[GraphFolder | str]:
    """Export the base of a merge as ``record`` says that the merged model was; give a reason where that cannot be."""
    changed = _changed_shape(plan)
    if changed:
        yield f"the adapter changes what the graph is ({changed}), so the base has no such graph"
        return
    cache_root().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="base-", dir=cache_root()) as made:
        folder = Path(made) / "onnx"
        try:
            _export(plan, record, folder, progress)
        except (ExportError, MergeError) as error:
            yield f"the base cannot be exported: {error.message}"
            return
        found = find_graphs(folder)
        assert found is not None  # noqa: S101 - it was just exported
        yield found


def _changed_shape(plan: MergePlan) -> str:
    """Name a tensor that the base does not have like that, or a setting that the merge changes; empty without one."""
    binding = plan.binding
    added = (name for name, source in binding.outputs.items() if source is None)
    return next(iter((*binding.shapes, *added, *binding.config_edits)), "")


def _export(plan: MergePlan, record: ExportRecord, folder: Path, progress: Progress | None) -> None:
    bare = plan_merge(replace(plan.binding, updates={}), plan.options, companions=plan.companions)
    chosen = record.options
    options = ExportOptions(
        dtype=chosen["dtype"], provider=chosen["provider"], layout=chosen["layout"], maker=chosen["maker"]
    )
    planned = plan_export(PlanSource(bare), options)
    # A graph that keeps the checkpoint's layout is another one, wherever its weights are.
    is_stored = chosen["storage"] == "shared"
    planned = replace(planned, blueprint=replace(planned.blueprint, is_stored=is_stored))
    execute_export(planned, folder, progress=progress)
