"""Whether something else of the same merge lies in a tensor's place.

That may be another formula, the transposed delta, another module's update, or another tensor. Work is bounded:
hypotheses are compared on a sample of one block, at most 512 of each sort, and one is checked in full.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice

from lora_deploy.adapter import ModuleUpdate
from lora_deploy.evidence.explanation import Explanation
from lora_deploy.evidence.outcome import Outcome
from lora_deploy.evidence.survey import Subject
from lora_deploy.merge.plan import MergePlan, PlannedTensor
from lora_deploy.updates.additive import Additive
from lora_deploy.updates.dora import Dora
from lora_deploy.updates.interface import Update
from lora_deploy.updates.low_rank import LowRank
from lora_deploy.updates.residual import WithoutComponent

_MOST_CANDIDATES = 512


def find_left_out(subject: Subject) -> Iterator[Explanation]:
    """Explain a tensor by a part that was left out: one of several updates, DoRA's magnitude, PiSSA's residual."""
    entries = subject.tensor.updates
    plain = [_plain(entry) for entry in entries]
    if any(one is not other for one, other in zip(plain, entries, strict=True)):
        kinds = {entry.update.kind for entry in entries if isinstance(entry.update, Dora | WithoutComponent)}
        if subject.accepts(subject.with_updates(plain)):
            message = f"merged as plain low-rank updates, without what makes them {', '.join(sorted(kinds))}"
            yield Explanation(outcome=Outcome.WRONG_FORMULA, message=message)
    adapters = sorted({entry.adapter_index for entry in entries})
    for index in adapters if len(adapters) > 1 else ():
        if subject.accepts(subject.with_updates([entry for entry in entries if entry.adapter_index != index])):
            message = f"the update of adapter {index + 1} of {adapters[-1] + 1} is not there"
            yield Explanation(outcome=Outcome.PARTLY_APPLIED, message=message)


def find_transposed(subject: Subject) -> Iterator[Explanation]:
    """Explain a tensor by the transposed delta of a square region."""
    turned = [_turned(entry) for entry in subject.tensor.updates]
    differs = any(one is not other for one, other in zip(turned, subject.tensor.updates, strict=True))
    if differs and subject.accepts(subject.with_updates(turned)):
        yield Explanation(outcome=Outcome.WRONG_ORIENTATION, message="the transposed update was added")


def find_other_update(subject: Subject, plan: MergePlan) -> Iterator[Explanation]:
    """Explain a tensor by the update of another tensor, alone or on top of its own."""
    own = subject.tensor
    others = (other for other in plan.tensors if other.updates and _may_hold(own, other))
    hypotheses = {}
    for other in islice(others, _MOST_CANDIDATES):
        hypotheses[other.spec.name, True] = subject.with_updates(other.updates)
        if own.updates:
            hypotheses[other.spec.name, False] = subject.with_updates((*own.updates, *other.updates))
    errors = {key: subject.error_of(hypothesis) for key, hypothesis in hypotheses.items()}
    best = min(errors, key=lambda key: errors[key], default=None)
    if best is None or not subject.accepts(hypotheses[best]):
        return
    name, is_alone = best
    other = next(tensor for tensor in plan.tensors if tensor.spec.name == name)
    holds = f"holds the update of {name}{'' if is_alone else ' on top of its own'}"
    if _shares_source(own, other):
        message = f"{holds}: the two are one tensor in the base and were not untied; training adapted each by itself"
        yield Explanation(outcome=Outcome.CHANGED, message=message)
    else:
        yield Explanation(outcome=Outcome.ANOTHER_TENSOR, message=holds)


def find_other_tensor(subject: Subject, plan: MergePlan) -> Iterator[Explanation]:
    """Explain a tensor by the merged or base values of another name."""
    own = subject.tensor
    others = [t for t in plan.tensors if t.spec.shape == own.spec.shape and t.spec.name != own.spec.name]
    hypotheses = {}
    for other in others[:_MOST_CANDIDATES]:
        hypotheses[other.spec.name] = _in_place_of(own, other, other.updates)
        if other.updates and other.source is not None:
            hypotheses[f"{other.spec.name} of the base"] = _in_place_of(own, other, ())
    errors = {name: subject.error_of(hypothesis) for name, hypothesis in hypotheses.items()}
    best = min(errors, key=lambda name: errors[name], default=None)
    if best is not None and subject.accepts(hypotheses[best]):
        yield Explanation(outcome=Outcome.ANOTHER_TENSOR, message=f"holds {best}")


def _plain(entry: ModuleUpdate) -> ModuleUpdate:
    update = entry.update
    while isinstance(update, Dora | WithoutComponent):
        update = update.inner if isinstance(update, Dora) else update.low_rank
    return entry if update is entry.update else replace(entry, update=update)


def _turned(entry: ModuleUpdate) -> ModuleUpdate:
    update = entry.update
    if isinstance(update, Dora) and isinstance(update.inner, Additive):
        return entry
    if isinstance(update, Dora | WithoutComponent | LowRank) and update.shape[0] == update.shape[1] > 1:
        return replace(entry, update=update.transposed())
    return entry


def _may_hold(own: PlannedTensor, other: PlannedTensor) -> bool:
    """Whether another tensor's updates would fit here and differ from its own."""
    return (
        other.spec.name != own.spec.name
        and other.spec.shape == own.spec.shape
        and all(isinstance(entry.update, Update) for entry in other.updates)
    )


def _shares_source(own: PlannedTensor, other: PlannedTensor) -> bool:
    return own.source is not None and other.source is not None and own.source.name == other.source.name


def _in_place_of(own: PlannedTensor, other: PlannedTensor, updates: Sequence[ModuleUpdate]) -> PlannedTensor:
    return replace(own, source=other.source, updates=tuple(updates))
