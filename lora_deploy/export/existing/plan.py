"""Plan the merge into an existing export: its files as they are, but for the bytes of the weights that change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lora_deploy.adapters.interface import ReadOptions
from lora_deploy.errors import RecipeError
from lora_deploy.export.binding_table import Slot, taken_tensors
from lora_deploy.export.existing.base import OnnxBase
from lora_deploy.export.existing.expressible import require_expressible
from lora_deploy.merge.options import MergeOptions
from lora_deploy.merge.plan import MergePlan, ShardPlan, plan_merge
from lora_deploy.validate import Binding

_HELD = 3
"""A slot in memory: the merged tensor, the initializer made of it, and its bytes in the graph's order."""
_CONFIG_NAME = "config.json"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PatchedFile(ShardPlan):
    """A file of the export; what no slot covers is copied."""

    n_file_bytes: int
    slots: tuple[Slot, ...]
    """Those that change, in the order of their offsets."""

    @property
    def n_bytes(self) -> int:
        """Size of the file, which does not change."""
        return self.n_file_bytes


def plan_existing(
    binding: Binding,
    options: MergeOptions,
    *,
    read_options: ReadOptions | None = None,
    companions: Mapping[str, Path] | None = None,
) -> MergePlan:
    """Plan a merge into the export that the binding's base is.

    Raises:
        IncompatibleAdapterError: The graph cannot hold the result.
        RecipeError: Another dtype is wanted than the graph's.
    """
    base = binding.checkpoint
    assert isinstance(base, OnnxBase)  # noqa: S101 - the caller asked
    require_expressible(binding, base)
    _require_own_dtype(binding, base, options)
    plan = plan_merge(binding, replace(options, dtype="base"), read_options=read_options)
    planned = [replace(t, spec=replace(t.spec, file=base.tensors[t.spec.name].file)) for t in plan.tensors]
    slots = [slot for slot in base.slots if any(t.tensor in binding.updates for t in taken_tensors(slot.origin))]
    files = tuple(
        PatchedFile(
            file=file,
            tensors=tuple(tensor for tensor in planned if tensor.spec.file == file),
            header=b"",
            n_file_bytes=(base.root / file).stat().st_size,
            slots=tuple(sorted((slot for slot in slots if slot.file == file), key=lambda slot: slot.offset)),
        )
        for file in base.files
    )
    own = {n: path for n, path in base.travelling.items() if n != _CONFIG_NAME or not binding.config_edits}
    return replace(
        plan,
        shards=files,
        companions={**(companions or {}), **own},
        n_whole_bytes=_HELD * max((slot.n_bytes for slot in slots), default=0),
    )


def _require_own_dtype(binding: Binding, base: OnnxBase, options: MergeOptions) -> None:
    found = sorted({base.tensors[name].dtype.long_name for name in binding.updates})
    if options.dtype != "base" and found not in ([options.dtype], []):
        raise RecipeError(
            f"dtype: found {options.dtype}, expected {' and '.join(found)}: a graph keeps its number format",
            hint="--dtype base",
        )
