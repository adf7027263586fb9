"""Bind adapters to a base of several models: each to one of them, or each of its parts, and all of them together.

Promise: what an adapter's file says the component of goes there. Else an adapter goes to the component that the user
names, or to the only one that all of it fits, by names and by shapes. Within its component it is bound as to any base.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

from lora_deploy.adapter import Adapter, ModuleUpdate
from lora_deploy.checkpoint import Checkpoint
from lora_deploy.errors import Finding, IncompatibleAdapterError, RecipeError, Severity
from lora_deploy.validate.binding import Binding, BindOptions
from lora_deploy.validate.choice import Choice
from lora_deploy.validate.findings import Findings, misfit
from lora_deploy.validate.parts import Model

BindModel: TypeAlias = Callable[[Sequence[Adapter], Checkpoint, BindOptions, Choice], Binding]
Models: TypeAlias = Mapping[str, Model]


def bind_pipeline(
    adapters: Sequence[Adapter],
    pipeline: Checkpoint,
    models: Models,
    options: BindOptions,
    choice: Choice,
    bind_model: BindModel,
) -> Binding:
    """Bind every adapter to its components with ``bind_model``, and give one binding of all.

    Raises:
        RecipeError: An option names no component, or an adapter fits several and none is named.
        IncompatibleAdapterError: An adapter fits no component, or not the one that was named.
    """
    if options.tokenizer == "adapter":
        raise RecipeError("--tokenizer adapter: a pipeline keeps its own tokenizers", hint="leave it out")
    findings = Findings()
    shares: dict[str, dict[int, Adapter]] = {}
    for k, adapter in enumerate(adapters):
        for component, share in _shared_out(k, adapter, pipeline, models, options, findings, bind_model).items():
            shares.setdefault(component, {})[k] = share
    bindings: dict[str, Binding] = {}
    for component, share_of in shares.items():
        positions, model = [*share_of], models[component]
        own = replace(options, weights=tuple(options.weights[k] for k in positions) if options.weights else ())
        try:
            bound = bind_model([*share_of.values()], model.checkpoint, own, choice.within(model.prefix))
        except IncompatibleAdapterError as error:
            findings.extend(_within(model.prefix, error.findings, adapters))
            continue
        bindings[component] = replace(bound, updates=_renumbered(bound.updates, positions))
    if findings.has_errors:
        raise misfit(adapters, pipeline, findings)
    return _joined(adapters, pipeline, models, options, choice, bindings)


def of_one_model(adapters: Sequence[Adapter]) -> None:
    """Check that no adapter is for more than one model, where the base is one.

    Raises:
        RecipeError: It is; one of its parts may be chosen.
    """
    for adapter in adapters:
        components = {update.components for update in adapter.updates if update.components}
        if len(components) > 1:
            names = sorted(names[0] for names in components)
            raise RecipeError(
                f"adapter {adapter.path} is for several models, {', '.join(names)}, and the base is one",
                hint=f"merge it into the whole pipeline, or take one part: --adapter-name {names[-1]}",
                code="several-components",
            )


def _shared_out(
    k: int,
    adapter: Adapter,
    pipeline: Checkpoint,
    models: Models,
    options: BindOptions,
    findings: Findings,
    bind_model: BindModel,
) -> dict[str, Adapter]:
    """Give what each component gets of an adapter; findings of the adapter go with the first."""
    groups: dict[str | None, list[ModuleUpdate]] = {}
    for update in adapter.updates:
        component = next((name for name in update.components if name in models), None)
        if update.components and component is None:
            message = f"is for the {update.components[0]}, {pipeline.ref.name} has {', '.join(models)}"
            findings.error("component-missing", update.target, message, update.keys)
        else:
            groups.setdefault(component, []).append(update)
    shares: dict[str, list[ModuleUpdate]] = {}
    for told, updates in (groups or {None: []}).items():
        part = replace(adapter, updates=tuple(updates))
        component = told or _component_of(k, part, pipeline, models, options, bind_model)
        if options.components and _named(k, pipeline, models, options) != component:
            raise RecipeError(
                f"--component {_named(k, pipeline, models, options)}: {adapter.path} says that it is for {component}",
                hint="leave --component out",
            )
        shares.setdefault(component, []).extend(updates)
    return {
        component: replace(adapter, updates=tuple(updates), findings=() if n else adapter.findings)
        for n, (component, updates) in enumerate(shares.items())
    }


def _component_of(
    k: int, adapter: Adapter, pipeline: Checkpoint, models: Models, options: BindOptions, bind_model: BindModel
) -> str:
    if options.components:
        return _named(k, pipeline, models, options)
    fits: list[str] = []
    misfits: dict[str, IncompatibleAdapterError] = {}
    for component, model in models.items():
        alone = replace(options, weights=())
        try:
            bound = bind_model([adapter], model.checkpoint, alone, Choice(alone).within(model.prefix))
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
    return min(misfits or models, key=lambda name: _n_errors(misfits[name]) if misfits else 0)


def _named(k: int, pipeline: Checkpoint, models: Models, options: BindOptions) -> str:
    name = options.components[k] if len(options.components) > 1 else options.components[0]
    if name not in models:
        raise RecipeError(
            f"--component {name}: {pipeline.ref.name} has no such component with weights",
            hint=f"it has {', '.join(models)}",
        )
    return name


def _n_errors(error: IncompatibleAdapterError) -> int:
    return sum(finding.severity is Severity.ERROR for finding in error.findings)


def _within(prefix: str, findings: Sequence[Finding], adapters: Sequence[Adapter]) -> Iterator[Finding]:
    """Name what findings are about as the pipeline does; adapters keep their names."""
    names = {adapter.name for adapter in adapters}
    for finding in findings:
        is_inside = finding.target not in names
        yield replace(finding, target=f"{prefix}{finding.target}") if is_inside else finding


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
    models: Models,
    options: BindOptions,
    choice: Choice,
    bindings: Mapping[str, Binding],
) -> Binding:
    """Put the components' bindings together, under the names that their tensors have in the base."""
    outputs: dict[str, str | None] = {name: name for name in pipeline.tensors}
    updates: dict[str, tuple[ModuleUpdate, ...]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    edits: dict[str, object] = {}
    findings = Findings()
    for component, bound in bindings.items():
        prefix = models[component].prefix
        for name in models[component].checkpoint.tensors:
            if name not in bound.outputs:
                del outputs[prefix + name]
        outputs |= {prefix + name: source and prefix + source for name, source in bound.outputs.items()}
        for name, entries in bound.updates.items():
            updates[prefix + name] = tuple(replace(entry, target=prefix + entry.target) for entry in entries)
        shapes |= {prefix + name: shape for name, shape in bound.shapes.items()}
        edits |= {f"{component}.{path}": value for path, value in bound.config_edits.items()}
        findings.extend(_within(prefix, bound.findings, adapters))
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
