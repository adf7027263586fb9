"""Everything that is learned from the unmerged model, in one loading of the base.

In this order: the base's outputs; the unmerged model's, with the largest values at its modules' borders; then those of
the merged model with weights rounded by chance, seed by seed. All in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_deploy.evidence.architecture import Absence
from lora_deploy.evidence.chanced import DTypes
from lora_deploy.evidence.conventions import Conventions
from lora_deploy.evidence.divergence import Divergence, Divergences, compare_outputs, join
from lora_deploy.evidence.forward import Outputs
from lora_deploy.evidence.loading import as_folder
from lora_deploy.evidence.magnitude import RangeReport, recording, summarise
from lora_deploy.evidence.probe import SEED, Probe
from lora_deploy.evidence.reference import Unmerged, unmerged
from lora_deploy.evidence.runnable import Runnable
from lora_deploy.evidence.tolerance import N_SEEDS
from lora_deploy.merge.plan import MergePlan
from lora_deploy.rounding import torch_dtype
from lora_deploy.tensors import DType

N_PASSES = 2 + N_SEEDS
_FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReferenceRun:
    """The reference's outputs, and what it takes to judge by them."""

    outputs: Mapping[str, Mapping[str, Tensor]]
    effect: tuple[Divergence, ...]
    """Unmerged against base, by output."""
    base: Outputs
    """The base's outputs, of its weights as they are; empty where no graph is compared."""
    stored_base: Mapping[torch.dtype, Outputs]
    """By the format of graphs, of the base's weights as these graphs hold them: rounded to the format that the merged
    checkpoint stores them in, then to the graph's."""
    arithmetic: tuple[Divergence, ...]
    """The base in float32 against float64: what adding in another order may do; empty where no graph is compared."""
    roundings: tuple[Divergences, ...]
    """Unmerged against weights rounded by chance, by seed, each by ``probe/output``."""
    magnitudes: RangeReport
    source: str
    is_independent: bool
    missing: frozenset[str]
    """Parameters that the base does not hold and its architecture wants."""


def run_reference(
    plan: MergePlan,
    runnable: Runnable,
    probes: Sequence[Probe],
    dtypes: DTypes,
    advance: Callable[[int], None],
    *,
    graph_dtypes: AbstractSet[torch.dtype] = frozenset(),
) -> ReferenceRun | Absence:
    """Run the base, the unmerged model and its roundings; with graphs' formats, what their export shares need.

    Raises:
        EvidenceError: The base does not load.
        InputError: The adapter's file is not the one that was merged.
    """
    n_bytes = plan.n_bytes
    with as_folder(plan.binding.checkpoint) as folder:
        model, missing = runnable.load(folder, **_settings(plan))
    _resize(model, plan)
    base = runnable.run(model, probes, greedy=False)
    stored, arithmetic = _for_graphs(runnable, model, probes, base, dtypes, graph_dtypes)
    advance(n_bytes)
    with unmerged(model, plan) as found:
        if isinstance(found, Absence):
            return found
        with recording(found.modules) as magnitudes:
            outputs = runnable.run(found.model, probes)
        advance(n_bytes)
        effect = join(compare_outputs(outputs, base))
        base = base if graph_dtypes else {}
        roundings = []
        for seed in range(N_SEEDS):
            roundings.append(_rounding(runnable, found, outputs, probes, dtypes, SEED + seed))
            advance(n_bytes)
    return ReferenceRun(
        outputs=outputs,
        effect=effect,
        base=base,
        stored_base=stored,
        arithmetic=arithmetic,
        roundings=tuple(roundings),
        magnitudes=summarise(magnitudes, applies=dtypes.usual is DType.F16),
        source=found.source,
        is_independent=found.is_independent,
        missing=missing,
    )


def _for_graphs(
    runnable: Runnable,
    model: nn.Module,
    probes: Sequence[Probe],
    base: Outputs,
    dtypes: DTypes,
    graph_dtypes: AbstractSet[torch.dtype],
) -> tuple[Mapping[torch.dtype, Outputs], tuple[Divergence, ...]]:
    """Run the base at the weights that graphs hold, and in float64; the model is float32 as before."""
    if not graph_dtypes:
        return {}, ()
    arithmetic = join(compare_outputs(runnable.run(model.double(), probes, greedy=False), base))
    model.float()
    found: dict[torch.dtype, Outputs] = {}
    stored = dict(_stored_tensors(model, dtypes))
    saved = {name: tensor.data for name, tensor in stored.items()}
    for dtype in graph_dtypes:
        is_rounded = False
        for name, tensor in stored.items():
            held = tensor.data.to(torch_dtype(dtypes.of_tensor(name))).to(dtype).float()
            is_rounded |= not torch.equal(held, tensor.data)
            tensor.data = held
        found[dtype] = runnable.run(model, probes, greedy=False) if is_rounded else base
        for name, tensor in stored.items():
            tensor.data = saved[name]
    return found, arithmetic


def _stored_tensors(model: nn.Module, dtypes: DTypes) -> Iterator[tuple[str, Tensor]]:
    """Give parameters, and the buffers that the checkpoint stores: tables of positions, running means."""
    yield from ((name, parameter) for name, parameter in model.named_parameters() if parameter.is_floating_point())
    for name, buffer in model.named_buffers():
        if name in dtypes.by_name and buffer.is_floating_point():
            yield name, buffer


def _rounding(
    runnable: Runnable,
    found: Unmerged,
    outputs: Mapping[str, Mapping[str, Tensor]],
    probes: Sequence[Probe],
    dtypes: DTypes,
    seed: int,
) -> Divergences:
    generator = torch.Generator().manual_seed(seed)
    with found.rounded(dtypes, generator):
        return compare_outputs(outputs, runnable.run(found.model, probes, greedy=False))


def _settings(plan: MergePlan) -> dict[str, Any]:
    """What the merged model's configuration changes about the shape of the base's head."""
    labels = plan.binding.config_edits.get("id2label")
    return {"num_labels": len(labels), "ignore_mismatched_sizes": True} if isinstance(labels, Mapping) else {}


def _resize(model: nn.Module, plan: MergePlan) -> None:
    """Give the base the rows that the adapter's own embedding has; PEFT then fills them."""
    n_tokens = plan.binding.config_edits.get("vocab_size")
    if isinstance(n_tokens, int):
        model.resize_token_embeddings(n_tokens, mean_resizing=False)  # type: ignore[operator]


def needed_bytes(plan: MergePlan, probes: Sequence[Probe], *, n_graphs: int = 0) -> int:
    """Estimate the memory of a reference run: weights and their roundings in float32, the largest in float64, outputs.

    The vocabulary, where there is one, is taken for the width of every output; four sets of outputs are held, and one
    more for each of so many graphs.
    """
    elements = [tensor.spec.n_elements for tensor in plan.tensors]
    rounded = [tensor.spec.n_elements for tensor in plan.tensors if tensor.updates or plan.dtype is not None]
    n_positions = sum(
        max((t.shape[0] * t.shape[-1] for t in probe.inputs.values() if t.ndim == 2), default=1) for probe in probes
    )
    n_tokens = Conventions(config=plan.config).text.get("vocab_size", 1)
    width = n_tokens if isinstance(n_tokens, int) else 1
    weights = _FLOAT32_BYTES * (sum(elements) + sum(rounded)) + 3 * 8 * max(elements, default=0)
    return weights + (4 + n_graphs) * _FLOAT32_BYTES * n_positions * width
