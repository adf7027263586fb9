"""Where the weights of an export come from: a merged folder, or base and adapters straight from their plan.

Promise: a tensor is given whole, in the order that is asked for, and no more than one is held at a time; from a plan,
its values are those that merging would write (laws 1 to 3). No merged checkpoint is made on the way. Tensor libraries
are loaded when a tensor is asked for, not before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lora_deploy.artifact import Artifact
from lora_deploy.checkpoint import Checkpoint
from lora_deploy.errors import ExportError
from lora_deploy.merge.identity import base_artifacts, identify
from lora_deploy.merge.progress import Progress
from lora_deploy.merge.record import RecordedOrigin
from lora_deploy.names.index import NameIndex
from lora_deploy.names.ties import ties_of
from lora_deploy.pipeline_layout import SEPARATOR
from lora_deploy.tensors import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from lora_deploy.merge.plan import MergePlan, PlannedTensor


class WeightSource(Protocol):
    """Tensors of a model that is to be exported."""

    name: str
    """What to call it in messages."""
    config: Mapping[str, Any]
    specs: Mapping[str, TensorSpec]
    companions: Mapping[str, Path]
    """Files that travel: name, and where from."""

    def tensors(self, names: Iterable[str]) -> Iterator[Tensor]:
        """Give tensors by name, whole, in their stored dtype and shape; a name may come twice."""
        ...

    def inputs(self, progress: Progress | None) -> Mapping[str, Any]:
        """Say what the weights are, by digests: JSON for the record."""
        ...

    def origin(self, inputs: Mapping[str, Any]) -> RecordedOrigin | None:
        """Say from what they are merged on the way; None where they were merged before. ``inputs`` are those above."""
        ...


class CheckpointSource:
    """A folder of merged weights."""

    def __init__(self, checkpoint: Checkpoint, companions: Mapping[str, Path]) -> None:
        """Read nothing yet."""
        self.name = str(checkpoint.root)
        self.config = checkpoint.config
        self.specs = checkpoint.tensors
        self.companions = companions
        self.checkpoint = checkpoint

    def tensors(self, names: Iterable[str]) -> Iterator[Tensor]:
        """Map tensors of the files."""
        return (mapped(self.checkpoint, name) for name in names)

    def inputs(self, progress: Progress | None) -> Mapping[str, Any]:
        """Digest the weight files."""
        return {"merged": [_file(artifact) for artifact in base_artifacts(self.checkpoint, progress)]}

    def origin(self, inputs: Mapping[str, Any]) -> None:
        """Say nothing: the folder's own record does."""


class PlanSource:
    """A merge that is computed while it is exported."""

    def __init__(self, plan: MergePlan) -> None:
        """Compute nothing yet."""
        adapters = "+".join(adapter.name for adapter in plan.binding.adapters)
        base = plan.binding.checkpoint.ref.name
        self.name = f"{adapters} on {base}" if adapters else base
        self.config: Mapping[str, Any] = plan.config
        self.companions: Mapping[str, Path] = plan.companions
        self._plan = plan
        self._planned: dict[str, PlannedTensor] = {tensor.spec.name: tensor for tensor in plan.tensors}
        self.specs: Mapping[str, TensorSpec] = {name: tensor.spec for name, tensor in self._planned.items()}

    def tensors(self, names: Iterable[str]) -> Iterator[Tensor]:
        """Compute tensors; the workers are already at the next while one is used.

        Raises:
            MergeError: A value cannot be merged or stored.
        """
        from lora_deploy.merge.budget import fit
        from lora_deploy.merge.local import chosen_device, local_workers
        from lora_deploy.merge.whole import whole_tensors

        footprint, device = fit(self._plan), chosen_device(self._plan.options.device)
        checkpoint = self._plan.binding.checkpoint
        with local_workers(footprint.n_workers, footprint.n_ahead, device) as workers:
            planned = (self._planned[name] for name in names)
            for _, tensor, _ in whole_tensors(planned, checkpoint, workers, footprint.chunk_elements):
                yield tensor

    def inputs(self, progress: Progress | None) -> Mapping[str, Any]:
        """Digest base and adapters, and say with which options they are merged."""
        return {"merge": identify(self._plan, progress)}

    def origin(self, inputs: Mapping[str, Any]) -> RecordedOrigin:
        """Say which base and adapters, and where they lie."""
        from lora_deploy.merge.compose import compose_origin

        return compose_origin(self._plan, inputs["merge"])


def mapped(checkpoint: Checkpoint, name: str) -> Tensor:
    """Map a tensor of a checkpoint; nothing is copied."""
    import torch

    from lora_deploy.rounding import torch_dtype

    spec = checkpoint.tensors[name]
    dtype = torch_dtype(spec.dtype)
    if not spec.n_bytes:
        return torch.empty(spec.shape, dtype=dtype)
    return torch.frombuffer(checkpoint.read(name), dtype=dtype).view(spec.shape)


def equal_groups(source: WeightSource) -> list[tuple[str, ...]]:
    """Find stored tensors that are one matrix under several names, such as a head beside the embedding it is tied to.

    Only what the architecture may share is compared: nothing is made of equal values elsewhere.
    """
    groups: list[tuple[str, ...]] = []
    for prefix, specs, config in _models_of(source):
        for tie in ties_of(NameIndex(specs, config), specs, config):
            if tie.is_stored:
                import torch

                names = (prefix + tie.source, prefix + tie.member)
                if torch.equal(*(next(source.tensors([name])) for name in names)):
                    groups.append(names)
    return groups


def components_of(source: WeightSource) -> tuple[str, ...]:
    """Name the components of a pipeline that have weights; none for a single model."""
    found = dict.fromkeys(name.partition(SEPARATOR)[0] for name in source.specs if SEPARATOR in name)
    return tuple(name for name in found if isinstance(source.config.get(name), Mapping))


def _models_of(source: WeightSource) -> Iterator[tuple[str, Mapping[str, TensorSpec], Mapping[str, Any]]]:
    """Give every model with the prefix of its tensors, and these under its own names."""
    components = components_of(source)
    if not components:
        yield "", source.specs, source.config
    for component in components:
        prefix = component + SEPARATOR
        own = {name.removeprefix(prefix): spec for name, spec in source.specs.items() if name.startswith(prefix)}
        yield prefix, {name: replace(spec, name=name) for name, spec in own.items()}, source.config[component]


def require_tensors(source: WeightSource, names: Sequence[str]) -> None:
    """Check that a table's tensors are there.

    Raises:
        ExportError: One is not.
    """
    missing = sorted(set(names) - set(source.specs))
    if missing:
        raise ExportError(f"{source.name}: lacks {len(missing)} tensors that the graph needs, first {missing[0]}")


def _file(artifact: Artifact) -> dict[str, Any]:
    return {"path": str(artifact.path), "n_bytes": artifact.n_bytes, "sha256": artifact.sha256}
