"""Say what is wrong with a tensor that no order of rounding explains: the usual mistakes, each tried in turn.

Promise: a mistake is named only when it accounts for nearly all elements, and for clearly more of them than the plan
does; otherwise the tensor is called unexplained, with its first differing element. Diagnosing reads the tensor a few
times; it is done only for tensors that have already failed.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from lora_deploy.checkpoint import Checkpoint
from lora_deploy.evidence.comparison import Comparison
from lora_deploy.evidence.explanation import Explanation
from lora_deploy.evidence.factors import find_factor
from lora_deploy.evidence.misplaced import find_left_out, find_other_tensor, find_other_update, find_transposed
from lora_deploy.evidence.outcome import Outcome
from lora_deploy.evidence.survey import Subject
from lora_deploy.merge.plan import MergePlan
from lora_deploy.rounding import torch_dtype

_FEW = 1e-3
"""Part of the elements that may differ for a tensor to be called altered, [0..1]."""
_MOST_TURNS = 8
"""Changes between merged and base elements, in order, for a tensor to be called partly applied."""


def diagnose(comparison: Comparison, plan: MergePlan, merged: Checkpoint) -> Explanation:
    """Name the mistake."""
    subject = Subject(tensor=comparison.tensor, stored=comparison.stored, base=plan.binding.checkpoint, merged=merged)
    return next(_explanations(comparison, subject, plan))


def describe_element(comparison: Comparison, merged: Checkpoint, position: int) -> str:
    """Say where an element lies and what is stored there."""
    stored = comparison.stored
    size = stored.dtype.n_bytes
    view = merged.read(stored.name, position * size, (position + 1) * size)
    value = torch.frombuffer(view, dtype=torch_dtype(stored.dtype))[0].item()
    index = [int(i) for i in np.unravel_index(position, stored.shape)] if stored.shape else []
    return f"first at {index}: found {value}"


def _explanations(comparison: Comparison, subject: Subject, plan: MergePlan) -> Iterator[Explanation]:
    is_adapted = bool(comparison.tensor.updates)
    if subject.survey.n_not_finite:
        message = f"{subject.survey.n_not_finite} of {comparison.n_elements} elements are not finite"
        yield Explanation(outcome=Outcome.NOT_FINITE, message=message)
    if is_adapted:
        yield from find_factor(subject)
        yield from find_transposed(subject)
        yield from find_left_out(subject)
    yield from find_other_update(subject, plan)
    yield from find_other_tensor(subject, plan)
    if is_adapted:
        yield from _partly(subject)
    yield from _altered(comparison, subject, is_adapted=is_adapted)
    yield _unexplained(comparison, subject, is_adapted=is_adapted)


def _partly(subject: Subject) -> Iterator[Explanation]:
    """Explain a tensor by runs of elements that were left at the base's values."""
    survey = subject.survey
    if not (survey.n_base and survey.n_merged and survey.n_turns <= _MOST_TURNS):
        return
    if survey.n_other > _FEW * survey.n_elements:
        return
    fraction = survey.n_base / (survey.n_base + survey.n_merged)
    message = f"elements {survey.first_base} to {survey.last_base} of {survey.n_elements} hold the base's values"
    yield Explanation(outcome=Outcome.PARTLY_APPLIED, message=message, fraction=fraction)


def _altered(comparison: Comparison, subject: Subject, *, is_adapted: bool) -> Iterator[Explanation]:
    """Explain a tensor by a few elements that are near neither the merged nor the base's value."""
    survey = subject.survey
    n_wrong = survey.n_other + survey.n_base
    if not 0 < n_wrong <= max(1.0, _FEW * survey.n_elements):
        return
    position = min(first for first in (survey.first_other, survey.first_base) if first is not None)
    where = describe_element(comparison, subject.merged, position)
    outcome = Outcome.ALTERED if is_adapted else Outcome.CHANGED
    yield Explanation(outcome=outcome, message=f"{n_wrong} of {survey.n_elements} elements are others, {where}")


def _unexplained(comparison: Comparison, subject: Subject, *, is_adapted: bool) -> Explanation:
    position = subject.survey.first_other if subject.survey.first_other is not None else comparison.first
    where = describe_element(comparison, subject.merged, position or 0)
    how = "" if subject.survey.n_other else ", each near the definition but in no known order of rounding"
    outcome = Outcome.UNEXPLAINED if is_adapted else Outcome.CHANGED
    message = f"{comparison.n_different} of {comparison.n_elements} elements differ{how}, {where}"
    return Explanation(outcome=outcome, message=message)
