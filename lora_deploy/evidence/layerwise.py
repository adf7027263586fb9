"""Parity for models larger than memory: part by part, each fed what the unmerged model feeds it.

A part (a block, an embedding, the head) is given its inputs once, by the unmerged model; the base, the unmerged model,
the same rounded by chance, and the merged checkpoint are run on these very inputs. So every part has an effect, a
floor, a tolerance and a power of its own, and a fault is found in the part that it is in.

Promise: one part at a time is in memory, at most three times over. What is not asked of parts is said: how their errors
add up towards the end, greedy tokens, and graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lora_deploy.checkpoint import Checkpoint
from lora_deploy.evidence.architecture import Absence, Architecture
from lora_deploy.evidence.chanced import DTypes
from lora_deploy.evidence.divergence import Divergence
from lora_deploy.evidence.forward import Outputs
from lora_deploy.evidence.magnitude import RangeReport, summarise
from lora_deploy.evidence.parity_report import SubjectReport
from lora_deploy.evidence.part_parity import PartReport, Sides, compare_part
from lora_deploy.evidence.passage import Passage
from lora_deploy.evidence.probe import Probe
from lora_deploy.evidence.reference import unmerged_parts
from lora_deploy.evidence.skeleton import Skeleton, empty_model, placed
from lora_deploy.evidence.tolerance import Power
from lora_deploy.evidence.verdict import Verdict
from lora_deploy.merge.plan import MergePlan
from lora_deploy.tensors import DType

NOTE = (
    "layer by layer: every part was fed the unmerged model's own hidden states; how errors add up from part to part, "
    "and greedy tokens, were not compared"
)
_COPIES = 3
"""A part, its roundings, and what is on its way into either."""
_FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerwiseRun:
    """What was found, part by part."""

    subjects: tuple[SubjectReport, ...]
    power: tuple[Power, ...]
    """Of each part that the adapter changes."""
    effect: tuple[Divergence, ...]
    """Unmerged against base, by part."""
    magnitudes: RangeReport
    source: str
    is_independent: bool
    outputs: Outputs
    """The unmerged model's, of the last part that runs: a decoder's logits."""


def run_layerwise(
    plan: MergePlan,
    merged: Checkpoint,
    architecture: Architecture,
    probes: Sequence[Probe],
    dtypes: DTypes,
    advance: Callable[[int], None],
) -> LayerwiseRun | Absence:
    """Compare a merged checkpoint with the unmerged model, part by part.

    Raises:
        EvidenceError: The model does not load or run in parts.
        InputError: The adapter's file is not the one that was merged.
    """
    base, own = Skeleton(plan.binding.checkpoint, architecture.name), Skeleton(merged, architecture.name)
    adapted = {tensor.spec.name: own.part_of(tensor.spec.name) for tensor in plan.tensors if tensor.updates}
    problem = _obstacle(plan, base, own, adapted)
    if problem:
        return Absence(reason=f"cannot be compared layer by layer: {problem}", is_applicable=True)
    beside = unmerged_parts(empty_model(plan.binding.checkpoint, architecture.name), plan)
    if isinstance(beside, Absence):
        return beside
    sides = Sides(base=base, merged=own, beside=beside, dtypes=dtypes, probes={probe.name: probe for probe in probes})
    reports: dict[str, PartReport] = {}
    with placed(base.model, base.read_rest()):
        for k, stop in enumerate(Passage(base.model, base.parts, probes).stops()):
            report = compare_part(sides, stop, index=k, is_adapted=stop.part in adapted.values())
            reports[stop.part if stop.part not in reports else f"{stop.part}, again ({k})"] = report
            advance(2 * plan.n_bytes // len(base.parts))
    unreached = sorted({part for part in adapted.values() if part is not None} - reports.keys())
    magnitudes = {name: value for report in reports.values() for name, value in report.magnitudes.items()}
    return LayerwiseRun(
        subjects=(*(report.subject for report in reports.values()), *(_unreached(part) for part in unreached)),
        power=tuple(power for report in reports.values() for power in report.power),
        effect=tuple(entry for report in reports.values() for entry in report.effect),
        magnitudes=summarise(magnitudes, applies=dtypes.usual is DType.F16),
        source=beside.source,
        is_independent=beside.is_independent,
        outputs=list(reports.values())[-1].outputs if reports else {},
    )


def _obstacle(plan: MergePlan, base: Skeleton, merged: Skeleton, adapted: dict[str, str | None]) -> str:
    """Say why parts cannot be set side by side; empty where they can."""
    if base.parts != merged.parts:
        return f"the base has {len(base.parts)} parts, the merged model {len(merged.parts)}"
    reshaped = plan.binding.config_edits.keys() & {"id2label", "vocab_size"}
    if reshaped:
        return f"the adapter changes {', '.join(sorted(reshaped))}"
    lost = next((name for name, part in adapted.items() if part is None), None)
    return f"{lost} belongs to no layer that runs by itself" if lost is not None else ""


def _unreached(part: str) -> SubjectReport:
    return SubjectReport(
        name=f"merged checkpoint, {part}",
        verdict=Verdict.INCONCLUSIVE,
        reason="no probe reaches it",
        by_probe={},
        facts={"part": part},
    )


def layerwise_bytes(plan: MergePlan, architecture: Architecture, probes: Sequence[Probe]) -> int:
    """Estimate the memory that it takes: copies of the largest part, and what parts give.

    Raises:
        EvidenceError: The model cannot be built in parts.
    """
    skeleton = Skeleton(plan.binding.checkpoint, architecture.name)
    n_positions = sum(
        max((t.shape[0] * t.shape[-1] for t in probe.inputs.values() if t.ndim == 2), default=1) for probe in probes
    )
    widths = (plan.config.get(name, 1) for name in ("hidden_size", "n_embd", "d_model"))
    hidden = max(width for width in widths if isinstance(width, int))
    n_tokens = plan.config.get("vocab_size", 1)
    n_values = n_positions * (2 * len(skeleton.parts) * hidden + 8 * (n_tokens if isinstance(n_tokens, int) else 1))
    return _COPIES * skeleton.largest_bytes + 2 * plan.n_updates_bytes + _FLOAT32_BYTES * n_values
