"""Turn what a comparison saw into one outcome; what no order of rounding explains goes to ``diagnosis``.

Inconclusive. Where an update is too small for the dtype to show, the base's bytes and the merged ones are the same,
so a merge cannot be told from none. Such bytes are still what the definition demands when they are exactly the
definition's: they harm a verdict only if nothing else in the folder shows that the adapter was applied. Where they
are not exactly the definition's, and only a coarser order of rounding allows them, nobody can tell, and the verdict
is inconclusive.
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_deploy.checkpoint import Checkpoint
from lora_deploy.evidence.comparison import Comparison
from lora_deploy.evidence.diagnosis import describe_element, diagnose
from lora_deploy.evidence.explanation import Explanation
from lora_deploy.evidence.orders import Order
from lora_deploy.evidence.outcome import Outcome, TensorOutcome
from lora_deploy.evidence.verdict import Verdict
from lora_deploy.merge.plan import MergePlan
from lora_deploy.updates.addition import Addition
from lora_deploy.updates.low_rank import LowRank
from lora_deploy.updates.replacement import Replacement
from lora_deploy.updates.token_rows import TokenRows


def judge(comparison: Comparison, plan: MergePlan, merged: Checkpoint, *, is_ours: bool) -> TensorOutcome:
    """Say what a stored tensor is."""
    explanation, order = _explained(comparison, plan, merged, is_ours=is_ours)
    return TensorOutcome(
        name=comparison.name,
        outcome=explanation.outcome,
        message=explanation.message,
        n_elements=comparison.n_elements,
        n_different=comparison.n_different,
        order=str(order) if order else None,
        factor=explanation.factor,
        fraction=explanation.fraction,
    )


def _explained(
    comparison: Comparison, plan: MergePlan, merged: Checkpoint, *, is_ours: bool
) -> tuple[Explanation, Order | None]:
    if comparison.error:
        return Explanation(outcome=Outcome.NOT_FINITE, message=comparison.error), None
    order = comparison.explanation
    if comparison.n_different and order is None:
        return _wrong(comparison, plan, merged)
    if not is_ours and _is_invisible(comparison):
        dtype = comparison.stored.dtype.long_name
        message = f"the update is too small for {dtype} to show: merged or not, the bytes may be these"
        return Explanation(outcome=Outcome.INCONCLUSIVE, message=message), None
    if comparison.n_different:
        message = f"{comparison.n_different} of {comparison.n_elements} elements rounded in another order: {order}"
        return Explanation(outcome=Outcome.ROUNDED, message=message), order
    message = "" if comparison.is_named_alike else f"stored as {comparison.stored.name}"
    return Explanation(outcome=Outcome.EXACT, message=message), None


def _wrong(comparison: Comparison, plan: MergePlan, merged: Checkpoint) -> tuple[Explanation, Order | None]:
    if _is_invisible(comparison):
        message = f"every element is the base's, rounded; the update changes {comparison.n_different} of them"
        return Explanation(outcome=Outcome.NOT_APPLIED, message=message, factor=0.0), None
    if comparison.best is None:
        return diagnose(comparison, plan, merged), None
    order, misses = comparison.best
    where = describe_element(comparison, merged, misses.first or 0)
    outcome = Outcome.ALTERED if comparison.tensor.updates else Outcome.CHANGED
    message = f"{misses.n_elements} of {comparison.n_elements} elements are others, {where}"
    return Explanation(outcome=outcome, message=message), order


def overall(outcomes: Sequence[TensorOutcome], comparisons: Sequence[Comparison], *, is_ours: bool) -> Verdict:
    """Sum up: one failure fails; see the module for what is inconclusive."""
    harmless = {Outcome.EXACT, Outcome.IGNORED} if is_ours else {Outcome.EXACT, Outcome.IGNORED, Outcome.ROUNDED}
    if any(entry.outcome not in {*harmless, Outcome.INCONCLUSIVE} for entry in outcomes):
        return Verdict.FAIL
    invisible = [entry for entry in outcomes if entry.outcome is Outcome.INCONCLUSIVE]
    is_shown = any(comparison.shows_update for comparison in comparisons)
    if invisible and (not is_shown or any(entry.n_different for entry in invisible)):
        return Verdict.INCONCLUSIVE
    return Verdict.PASS


def _is_invisible(comparison: Comparison) -> bool:
    """Whether an update that changes something left every element at the base's rounded value."""
    if comparison.shows_update or not comparison.tensor.updates:
        return False
    return not all(_changes_nothing(entry.update) for entry in comparison.tensor.updates)


def _changes_nothing(update: object) -> bool:
    """Whether an update is zero as a matter of fact, as an untrained module's is, or gives values, not differences."""
    if isinstance(update, LowRank):
        return not (update.scale.value and bool(update.up.any()) and bool(update.down.any()))
    if isinstance(update, Addition):
        return not (update.scale.value and bool(update.values.any()))
    return isinstance(update, Replacement | TokenRows)
