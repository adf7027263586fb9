"""Say what is wrong with a tensor that no order of rounding explains."""

from __future__ import annotations

from lora_deploy.checkpoint import Checkpoint
from lora_deploy.evidence.comparison import Comparison
from lora_deploy.evidence.outcome import Outcome, TensorOutcome
from lora_deploy.merge.plan import MergePlan


def diagnose(comparison: Comparison, plan: MergePlan, merged: Checkpoint) -> TensorOutcome:
    """Name the mistake."""
    del plan, merged
    is_adapted = bool(comparison.tensor.updates)
    outcome = Outcome.UNEXPLAINED if is_adapted else Outcome.CHANGED
    if is_adapted and not comparison.shows_update:
        outcome = Outcome.NOT_APPLIED
    return TensorOutcome(
        name=comparison.name,
        outcome=outcome,
        message=f"{comparison.n_different} of {comparison.tensor.spec.n_elements} elements differ",
        n_elements=comparison.tensor.spec.n_elements,
        n_different=comparison.n_different,
    )
