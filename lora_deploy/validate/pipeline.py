"""Bind adapters to a diffusion pipeline: each to one of its components, and all of them together.

Promise: an adapter goes to the component that the user names, or to the only one that all of it fits, by names and by
shapes. Within its component it is bound as to any base.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

from lora_deploy.adapter import Adapter, ModuleUpdate
from lora_deploy.checkpoint import Checkpoint
from lora_deploy.errors import Finding, IncompatibleAdapterError, RecipeError, Severity
from lora_deploy.pipeline_layout import SEPARATOR
from lora_deploy.validate.binding import Binding, BindOptions
from lora_deploy.validate.choice import Choice
from lora_deploy.validate.findings import Findings, misfit

BindModel: TypeAlias = Callable[[Sequence[Adapter], Checkpoint, BindOptions, Choice], Binding]


def bind_pipeline(
    adapters: Sequence[Adapter], pipeline: Checkpoint, options: BindOptions, choice: Choice, bind_model: BindModel
) -> Binding:
    """Bind every adapter to its component with ``bind_model``, and give one binding of all.

    Raises:
        RecipeError: An option names no component, or an adapter fits several and none is named.
        IncompatibleAdapterError: An adapter fits no component, or not the one that was named.
    """
    if options.tokenizer == "adapter":
        raise RecipeError("--tokenizer adapter: a pipeline keeps its own tokenizers", hint="leave it out")
    targets = [_component_of(k, adapters[k], pipeline, options, bind_model) for k in range(len(adapters))]
    bindings: dict[str, Binding] = {}
    findings = Findings()
    for component in dict.fromkeys(targets):
        positions = [k for k, target in enumerate(targets) if target == component]
        own = replace(options, weights=tuple(options.weights[k] for k in positions) if options.weights else ())
        try:
            bound = bind_model(
                [adapters[k] for k in positions], pipeline.components[component], own, choice.within(component)
            )
        except IncompatibleAdapterError as error:
            findings.extend(_within(component, error.findings, adapters))
            continue
        bindings[component] = replace(bound, updates=_renumbered(bound.updates, positions))
    if findings.has_errors:
        raise misfit(adapters, pipeline, findings)
    return _joined(adapters, pipeline, options, choice, bindings)


def _component_of(k: int, adapter: Adapter, pipeline: Checkpoint, options: BindOptions, bind_model: BindModel) -> str:
    if options.components:
        return _named(k, pipeline, options)
    fits: list[str] = []
    misfits: dict[str, IncompatibleAdapterError] = {}
    for component, part in pipeline.components.items():
        alone = replace(options, weights=())
        try:
            bound = bind_model([adapter], part, alone, Choice(alone).within(component))
        except IncompatibleAdapterError as error:
            misfits[component] = error
        else:
            fits += [component] if bound.updates else []
    if len(fits) > 1:
        raise RecipeError(
            f"adapter {adapter.path} fits several components of {pipeline.ref.name}: {', '.join(fits)}",
            hint=f"name the one that it was trained on: --component {fits[0]}",
            code="component-ambiguous",
        )
    if fits:
        return fits[0]
    # Rather the misfits of the component that most of it fits than those of all components.
    return min(misfits or pipeline.components, key=lambda name: _n_errors(misfits[name]) if misfits else 0)


def _named(k: int, pipeline: Checkpoint, options: BindOptions) -> str:
    name = options.components[k] if len(options.components) > 1 else options.components[0]
    if name not in pipeline.components:
        raise RecipeError(
            f"--component {name}: {pipeline.ref.name} has no such component with weights",
            hint=f"it has {', '.join(pipeline.components)}",
        )
    return name


def _n_errors(error: IncompatibleAdapterError) -> int:
    return sum(finding.severity is Severity.ERROR for finding in error.findings)


def _within(component: str, findings: Sequence[Finding], adapters: Sequence[Adapter]) -> Iterator[Finding]:
    """Name what findings are about as the pipeline does; adapters keep their names."""
    names = {adapter.name for adapter in adapters}
    for finding in findings:
        is_inside = finding.target not in names
        yield replace(finding, target=f"{component}{SEPARATOR}{finding.target}") if is_inside else finding


def _renumbered(
    updates: Mapping[str, Sequence[ModuleUpdate]], positions: Sequence[int]
) -> dict[str, tuple[ModuleUpdate, ...]]:
    return {
        name: tuple(replace(entry, adapter_index=positions[entry.adapter_index]) for entry in entries)
        for name, entries in updates.items()
    }


def _joined(
    adapters: Sequence[Adapter],
    pipeline: Checkpoint,
    options: BindOptions,
    choice: Choice,
    bindings: Mapping[str, Binding],
) -> Binding:
    """Put the components' bindings together, under the pipeline's names."""
    outputs: dict[str, str | None] = {}
    updates: dict[str, tuple[ModuleUpdate, ...]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    edits: dict[str, object] = {}
    findings = Findings()
    for component, part in pipeline.components.items():
        prefix = component + SEPARATOR
        bound = bindings.get(component)
        if bound is None:
            outputs |= {prefix + name: prefix + name for name in part.tensors}
            continue
        outputs |= {prefix + name: source and prefix + source for name, source in bound.outputs.items()}
        for name, entries in bound.updates.items():
            updates[prefix + name] = tuple(replace(entry, target=prefix + entry.target) for entry in entries)
        shapes |= {prefix + name: shape for name, shape in bound.shapes.items()}
        edits |= {f"{component}.{path}": value for path, value in bound.config_edits.items()}
        findings.extend(_within(component, bound.findings, adapters))
    return Binding(
        checkpoint=pipeline,
        adapters=tuple(adapters),
        outputs=outputs,
        updates=updates,
        shapes=shapes,
        config_edits=edits,
        excluded=choice.left_out,
        findings=findings.all,
        options=options,
    )
