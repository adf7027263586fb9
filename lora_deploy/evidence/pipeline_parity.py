"""Parity of diffusion pipelines: every component that an adapter changes, by itself, and the whole once to its end.

Promise: components are probed with what the base's own pipeline gives them: its text embeddings, and latents at early,
middle and late timesteps. Each has its own floors, tolerances and power, as any model; without power in each of them
the result is inconclusive. The pictures are told side by side and decide nothing: four steps blur and sharpen errors as
they like.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from torch import Tensor

from lora_deploy.checkpoint import Checkpoint
from lora_deploy.errors import EvidenceError, InconclusiveError
from lora_deploy.evidence.architecture import Absence, missing_packages
from lora_deploy.evidence.chanced import DTypes
from lora_deploy.evidence.component import Component, components_in, plan_of_component
from lora_deploy.evidence.divergence import diverge
from lora_deploy.evidence.graph_parity import Graphs, graph_subjects, run_all
from lora_deploy.evidence.graphs import GraphFolder
from lora_deploy.evidence.magnitude import RangeReport
from lora_deploy.evidence.outcome import NotApplicable
from lora_deploy.evidence.parity import ParityOptions, judged, reload_and_judge, unmeasured, weakest_power
from lora_deploy.evidence.parity_report import ParityReport, Picture, SubjectReport
from lora_deploy.evidence.picture import PROMPT, draw, graphs_in_place, heard, load_pipeline, png
from lora_deploy.evidence.probe import SEED, Probe
from lora_deploy.evidence.prompts import read_prompts
from lora_deploy.evidence.reference import unmerged
from lora_deploy.evidence.reference_run import N_PASSES, ReferenceRun, run_reference
from lora_deploy.evidence.session import open_session
from lora_deploy.evidence.tolerance import merge_share
from lora_deploy.evidence.verdict import Verdict
from lora_deploy.evidence.versions import versions
from lora_deploy.merge.plan import MergePlan
from lora_deploy.merge.progress import Progress, reporting

_HINT = "install the extras: pip install 'lora-deploy[export,diffusers]'"


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineGraphs:
    """The graphs of a merged pipeline and of its base, by name."""

    merged: Mapping[str, GraphFolder]
    base: Mapping[str, GraphFolder]
    provider: str = "cpu"


def check_pipeline_parity(
    plan: MergePlan,
    merged: Checkpoint | None,
    options: ParityOptions,
    *,
    graphs: PipelineGraphs | None,
    progress: Progress | None = None,
) -> ParityReport | NotApplicable:
    """Compare a merged pipeline, or a direct export of one, with the unmerged pipeline.

    Raises:
        InputError: The user's probes cannot be read, or an adapter's file is not the one that was merged.
    """
    started = time.monotonic()
    missing = missing_packages("diffusers", "transformers")
    if missing:
        return unmeasured(f"{' and '.join(missing)} not installed: no pipeline can be run", _HINT)
    prompts = (PROMPT, *(read_prompts(options.probes) if options.probes is not None else ()))
    with reporting(progress, "measuring parity", (N_PASSES + 3) * plan.n_bytes) as advance:
        try:
            drawn = _draw_unmerged(plan, prompts)
        except EvidenceError as error:
            return unmeasured(error.message, "the replay of its weights is what proves this merge")
        advance(2 * plan.n_bytes)
        parts = []
        for component in components_in(plan):
            part = _compare(plan, component, drawn.probes[component.graph], merged, graphs)
            if isinstance(part, ParityReport):
                return part
            parts.append(part)
        advance(N_PASSES * plan.n_bytes)
        pictures = {**drawn.pictures, **dict(_draw_others(merged, graphs, prompts[0]))}
        advance(plan.n_bytes)
    report = ParityReport(
        verdict=Verdict.PASS,
        reference=f"{plan.config['_class_name']}, float32, {' and '.join(dict.fromkeys(p.run.source for p in parts))}",
        is_independent=all(part.run.is_independent for part in parts),
        dtype=parts[0].dtypes.usual.long_name if parts else "",
        subjects=tuple(subject for part in parts for subject in part.subjects),
        power=tuple(
            replace(power, output=f"{part.component.graph}: {power.output}")
            for part in parts
            for power in weakest_power(part.run, part.subjects)
        ),
        effect=tuple(
            replace(entry, output=f"{part.component.graph}: {entry.output}")
            for part in parts
            for entry in part.run.effect
        ),
        magnitudes=_worst_range([part.run.magnitudes for part in parts]),
        probes={f"{graph}: {p.name}": p.description for graph, probes in drawn.probes.items() for p in probes},
        pictures=_beside_unmerged(pictures),
        seed=SEED,
        notes=tuple(_notes(parts, drawn.why_no_picture)),
        versions=versions(),
        seconds=time.monotonic() - started,
    )
    return judged(report)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Drawn:
    """What the base's pipeline gave, and what its components were given."""

    probes: Mapping[str, tuple[Probe, ...]]
    """By graph."""
    pictures: Mapping[str, Tensor]
    """Of the base, and of the unmerged model where it has the adapters beside its weights."""
    why_no_picture: str = ""


def _draw_unmerged(plan: MergePlan, prompts: Sequence[str]) -> _Drawn:
    """Run the base on every prompt, and the unmerged model on the first."""
    checkpoint, components = plan.binding.checkpoint, list(components_in(plan))
    pipeline = load_pipeline(checkpoint.root, plan.binding.options.variant)
    probes: dict[str, tuple[Probe, ...]] = {component.graph: () for component in components}
    pictures: dict[str, Tensor] = {}
    for number, prompt in enumerate(prompts):
        with heard(pipeline, components) as calls:
            picture = draw(pipeline, prompt)
        pictures.setdefault("base", picture)
        for graph, heard_calls in calls.items():
            spread = heard_calls.spread
            probes[graph] += tuple(
                Probe(name=f"prompt {number + 1}, call {k} of {len(spread)}", inputs=inputs)
                for k, inputs in enumerate(spread, start=1)
            )
    with ExitStack() as stack:
        for name in dict.fromkeys(component.name for component in components):
            found = stack.enter_context(unmerged(getattr(pipeline, name), plan_of_component(plan, name)))
            if isinstance(found, Absence):
                return _Drawn(probes=probes, pictures=pictures, why_no_picture=found.reason)
        pictures["unmerged"] = draw(pipeline, prompts[0])
    return _Drawn(probes=probes, pictures=pictures)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Part:
    """One graph's component, compared."""

    component: Component
    run: ReferenceRun
    dtypes: DTypes
    subjects: tuple[SubjectReport, ...]


def _compare(
    plan: MergePlan,
    component: Component,
    probes: Sequence[Probe],
    merged: Checkpoint | None,
    graphs: PipelineGraphs | None,
) -> _Part | ParityReport:
    if not probes:
        return unmeasured(f"{component.graph}: a picture drawn from a prompt does not need it, so nothing is known", "")
    own = plan_of_component(plan, component.name)
    stored = merged.components[component.name].tensors if merged else {t.spec.name: t.spec for t in own.tensors}
    dtypes = DTypes.of(stored, {tensor.spec.name for tensor in own.tensors if tensor.updates})
    runs = None
    if graphs is not None and component.graph in graphs.merged:
        pair = Graphs(
            merged=graphs.merged[component.graph],
            base=graphs.base.get(component.graph),
            provider=graphs.provider,
        )
        runs = run_all(pair, probes)
    formats = frozenset({runs.dtype}) if runs is not None and runs.dtype is not None else frozenset()
    try:
        run = run_reference(own, component, probes, dtypes, lambda _: None, graph_dtypes=formats)
    except EvidenceError as error:
        return unmeasured(f"the base cannot be run: {error.message}", "")
    if isinstance(run, Absence):
        return unmeasured(f"{component.name}: {run.reason}", run.hint)
    shares = merge_share(run.roundings, dtypes.usual.long_name)
    subjects: list[SubjectReport] = []
    if merged is not None:
        subjects.append(reload_and_judge(merged.components[component.name], component.spec, probes, run, shares)[0])
    if runs is not None:
        subjects += graph_subjects(runs, probes, run, dtypes.usual.long_name)
    named = (replace(subject, name=_named(subject.name, component)) for subject in subjects)
    return _Part(component=component, run=run, dtypes=dtypes, subjects=tuple(named))


def _named(subject: str, component: Component) -> str:
    return f"{component.graph}, reloaded" if "reloaded" in subject else f"onnx {component.graph}"


def _draw_others(merged: Checkpoint | None, graphs: PipelineGraphs | None, prompt: str) -> Iterator[tuple[str, Tensor]]:
    """Draw the merged pipeline's picture, and its graphs'; what cannot be drawn was told by its comparison."""
    if merged is None:
        return
    try:
        pipeline = load_pipeline(merged.root)
        yield "merged", draw(pipeline, prompt)
        if graphs is not None:
            sessions = {
                name: open_session(folder.prefill, provider=graphs.provider) for name, folder in graphs.merged.items()
            }
            with graphs_in_place(pipeline, sessions):
                yield "onnx", draw(pipeline, prompt)
    except (EvidenceError, InconclusiveError):
        return


def _beside_unmerged(pictures: Mapping[str, Tensor]) -> tuple[Picture, ...]:
    reference = pictures.get("unmerged")
    found = []
    for name, picture in pictures.items():
        alike = None
        if reference is not None and picture.shape == reference.shape:
            alike = diverge("picture", reference.reshape(1, -1), picture.reshape(1, -1))
        found.append(
            Picture(
                name=name,
                relative_l2=alike.relative_l2 if alike else None,
                cosine=alike.cosine if alike else None,
                png=png(picture),
            )
        )
    return tuple(found)


def _worst_range(reports: Sequence[RangeReport]) -> RangeReport | None:
    """Take the component whose values reach furthest."""
    return max(reports, key=lambda report: report.largest[0][1] if report.largest else 0.0, default=None)


def _notes(parts: Sequence[_Part], why_no_picture: str) -> Iterator[str]:
    if any(not part.run.is_independent for part in parts):
        yield "shares our reader: a scale that was read wrongly would be on both sides"
    for part in parts:
        if part.run.magnitudes.warning and part.run.magnitudes.verdict is Verdict.PASS:
            yield f"{part.component.name}: {part.run.magnitudes.warning}"
    if why_no_picture:
        yield f"no picture of the unmerged model: {why_no_picture}"
    yield "components without an adapter were not compared: their weights are the base's, as the replay says"
