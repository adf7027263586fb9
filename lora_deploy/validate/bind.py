"""The verb: adapters and a base in, a binding or all misfits out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lora_deploy.adapter import Adapter, Experts, ModuleUpdate
from lora_deploy.checkpoint import Checkpoint
from lora_deploy.companions import check_companions
from lora_deploy.errors import RecipeError, Severity, UnmergeableAdapterError
from lora_deploy.names import vocabulary_names
from lora_deploy.validate.base import Base
from lora_deploy.validate.binding import Binding, BindOptions
from lora_deploy.validate.carried import without_adapter
from lora_deploy.validate.choice import Choice
from lora_deploy.validate.combine import combine
from lora_deploy.validate.copies import resized_copies
from lora_deploy.validate.findings import Findings, misfit
from lora_deploy.validate.fit import fit
from lora_deploy.validate.identity import check_identity
from lora_deploy.validate.language_model import into_language_model
from lora_deploy.validate.model_wide import resolved
from lora_deploy.validate.parts import models_of
from lora_deploy.validate.pipeline import bind_pipeline, of_one_model
from lora_deploy.validate.placement import Placed, place
from lora_deploy.validate.prefix import output_names
from lora_deploy.validate.replacements import Replaced, apply_replacements
from lora_deploy.validate.replication import replicated
from lora_deploy.validate.sharing import share


def bind(adapters: Sequence[Adapter], checkpoint: Checkpoint, options: BindOptions | None = None) -> Binding:
    """Bind adapters, in order, to a base: a model, or a pipeline of components.

    Raises:
        RecipeError: An option cannot be obeyed: a weight too many, a pattern that matches nothing, no such component.
        IncompatibleAdapterError: Something does not fit; every misfit is in ``findings``.
    """
    options = options or BindOptions()
    if options.weights and len(options.weights) != len(adapters):
        raise RecipeError(f"found {len(options.weights)} weights for {len(adapters)} adapters")
    if len(options.components) > 1 and len(options.components) != len(adapters):
        raise RecipeError(f"found {len(options.components)} components for {len(adapters)} adapters")
    choice = Choice(options)
    if models := models_of(checkpoint):
        binding = bind_pipeline(adapters, checkpoint, models, options, choice, _bind_model)
    elif options.components:
        raise RecipeError(f"--component {options.components[0]}: {checkpoint.ref.name} is no pipeline of components")
    else:
        of_one_model(adapters)
        binding = _bind_model(adapters, checkpoint, options, choice)
    choice.check_patterns()
    return binding


def _bind_model(adapters: Sequence[Adapter], checkpoint: Checkpoint, options: BindOptions, choice: Choice) -> Binding:
    findings = Findings()
    findings.extend(checkpoint.findings)
    given, (adapters, checkpoint) = tuple(adapters), without_adapter(adapters, checkpoint)
    stack, config_edits = replicated(adapters, checkpoint, findings)
    base = Base(checkpoint, stack)
    if options.into_language_model:
        adapters = into_language_model(adapters, base)
    adapters = [resolved(adapter, base, findings) for adapter in adapters]
    placed: list[Placed] = []
    for k, adapter in enumerate(adapters):
        findings.extend(adapter.findings)
        check_identity(adapter, checkpoint, findings)
        copies = [replace(copy, adapter_index=k) for copy in resized_copies(adapter, base, findings)]
        placed += place(adapter, [*copies, *_weighted(adapter, k, options, findings)], base, choice, findings)
    placed, replaced = apply_replacements(placed, adapters, base, findings)
    updates = _fitted(placed, replaced, adapters, base, findings)
    outputs: dict[str, str | None] = {**stack, **dict.fromkeys(replaced.added)}
    edits = {**config_edits, **replaced.config_edits, **share(updates, outputs, adapters, base, findings)}
    combined = {name: combine(name, group, adapters, findings) for name, group in updates.items()}
    findings.extend(check_companions(adapters, checkpoint, _n_tokens(base, replaced), options.tokenizer))
    if findings.has_errors:
        raise misfit(adapters, checkpoint, findings)
    _check_consumed(adapters, combined, choice)
    shapes = _new_shapes(outputs, replaced, base)
    final = output_names(placed, replaced.added, base)
    return Binding(
        checkpoint=checkpoint,
        adapters=given,
        outputs={final(name): source for name, source in outputs.items()},
        updates={final(name): _renamed(combined[name], final(name)) for name in outputs if combined.get(name)},
        shapes={final(name): shape for name, shape in shapes.items()},
        config_edits=edits,
        excluded=choice.left_out,
        findings=tuple(finding for finding in findings.all if finding.severity is not Severity.ERROR),
        options=options,
    )


def _weighted(adapter: Adapter, k: int, options: BindOptions, findings: Findings) -> list[ModuleUpdate]:
    weight = options.weights[k] if options.weights else 1.0
    weighted = []
    for module_update in adapter.updates:
        update = module_update.update
        try:
            if weight != 1:
                update = _times(update, weight) if isinstance(update, Experts) else update.weighted(weight)
        except UnmergeableAdapterError as error:
            findings.error("weight", module_update.target, error.message, module_update.keys)
            continue
        weighted.append(replace(module_update, update=update, adapter_index=k))
    return weighted


def _times(experts: Experts, weight: float) -> Experts:
    return replace(experts, scales={name: scale.times(weight) for name, scale in experts.scales.items()})


def _fitted(
    placed: Sequence[Placed], replaced: Replaced, adapters: Sequence[Adapter], base: Base, findings: Findings
) -> dict[str, list[ModuleUpdate]]:
    updates: dict[str, list[ModuleUpdate]] = {}
    for item in placed:
        name = item.part.tensor
        spec = base.spec(name)
        shape = replaced.shapes.get(name) or _shared_shape(name, replaced, base)
        adapter = adapters[item.module_update.adapter_index]
        bound = fit(item, shape, spec.dtype if spec else None, adapter, base, findings)
        if bound is not None:
            updates.setdefault(name, []).append(bound)
    return updates


def _shared_shape(name: str, replaced: Replaced, base: Base) -> tuple[int, ...]:
    """Give the shape of a tensor that nothing replaces: the base's, or that of a resized tensor it shares."""
    for tie in base.ties:
        other = tie.source if name == tie.member else tie.member if name == tie.source else None
        if other in replaced.shapes and base.is_shared(tie):
            return replaced.shapes[other]
    spec = base.spec(name)
    return spec.shape if spec else ()


def _new_shapes(outputs: Mapping[str, str | None], replaced: Replaced, base: Base) -> dict[str, tuple[int, ...]]:
    if not replaced.shapes:
        return {}
    shapes = {name: replaced.shapes.get(name) or _shared_shape(name, replaced, base) for name in outputs}
    specs = {name: base.spec(name) for name in outputs}
    return {name: shape for name, shape in shapes.items() if (spec := specs[name]) is None or spec.shape != shape}


def _check_consumed(
    adapters: Sequence[Adapter], combined: Mapping[str, tuple[ModuleUpdate, ...]], choice: Choice
) -> None:
    """Law 4, on every run: no key of an adapter may get lost on the way here."""
    used = {key for updates in combined.values() for update in updates for key in update.keys} | {*choice.left_out}
    lost = [key for adapter in adapters for update in adapter.updates for key in update.keys if key not in used]
    if lost:
        raise AssertionError(f"binding lost {len(lost)} adapter keys, first {lost[0]}")


def _renamed(updates: Sequence[ModuleUpdate], name: str) -> tuple[ModuleUpdate, ...]:
    return tuple(update if update.target == name else replace(update, target=name) for update in updates)


def _n_tokens(base: Base, replaced: Replaced) -> int | None:
    """Rows of the input embedding after replacements; None when the base has none that is known."""
    names = vocabulary_names(base.index, base.specs)
    rows: list[int] = [replaced.shapes.get(name, base.specs[name].shape)[0] for name in names if ".bias" not in name]
    return max(rows, default=None)
