"""What a replay found in the place of one planned tensor, and what stands for a check that has no subject.

No tensor library is imported.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Outcome(StrEnum):
    """How stored bytes compare with the definition of the merge."""

    EXACT = "exact"
    """The definition's bytes."""
    ROUNDED = "rounded"
    """Every element is what one known order of rounding gives, or the definition's own value."""
    INCONCLUSIVE = "inconclusive"
    """Too small for the dtype to show: the base's own bytes would be just as right."""
    IGNORED = "ignored"
    """A buffer that the model computes itself."""
    NOT_APPLIED = "not-applied"
    """The base, rounded: the update is not there."""
    PARTLY_APPLIED = "partly-applied"
    """Every element is the merged or the base's value; both occur."""
    WRONG_SCALE = "wrong-scale"
    WRONG_ORIENTATION = "wrong-orientation"
    """The transposed delta was added."""
    WRONG_FORMULA = "wrong-formula"
    """Merged as another kind of update: DoRA's magnitude or PiSSA's residual was left out."""
    ANOTHER_TENSOR = "another-tensor"
    """What belongs to another name lies here."""
    CHANGED = "changed"
    """No adapter changes this tensor, and it is not the base's, not even rounded."""
    ALTERED = "altered"
    """The update is there, and some elements differ from it without a pattern."""
    UNEXPLAINED = "unexplained"
    """An adapted tensor that is neither merged nor the base's, nor any known mistake."""
    MISSING = "missing"
    EXTRA = "extra"
    WRONG_SHAPE = "wrong-shape"
    WRONG_DTYPE = "wrong-dtype"
    NOT_FINITE = "not-finite"
    """A NaN or infinity, stored or defined."""
    WRONG_CONFIG = "wrong-config"
    """``config.json`` contradicts the weights or the plan."""
    WRONG_LAYOUT = "wrong-layout"
    """The tensors are right, the file is not the planned one byte for byte."""
    WRONG_GRAPH = "wrong-graph"
    """An exported graph reads other weights than the merged ones."""

    @property
    def is_sound(self) -> bool:
        """Whether a checkpoint of any maker may have this."""
        return self in {Outcome.EXACT, Outcome.ROUNDED, Outcome.IGNORED}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorOutcome:
    """One tensor, or one entry of the configuration."""

    name: str
    """As the plan calls it; as the folder calls it when the plan has no such tensor."""
    outcome: Outcome
    message: str = ""
    """Found against expected, in one line; empty when the bytes are the definition's."""
    n_elements: int = 0
    """Elements compared."""
    n_different: int = 0
    """Elements that are not the definition's, to the bit."""
    order: str | None = None
    """The order of rounding that explains them."""
    factor: float | None = None
    """How many times the delta was added, where a multiple of it explains the tensor."""
    fraction: float | None = None
    """Part of the elements that hold the base's value instead of the merged one, [0..1]."""

    def to_json(self) -> dict[str, Any]:
        """What is known, for ``evidence.json``."""
        return {key: value for key, value in asdict(self).items() if value not in ("", None)}


@dataclass(frozen=True, slots=True, kw_only=True)
class NotApplicable:
    """A check that was not made, and why: it has no subject here, or the user left it out. It is never a pass."""

    reason: str
    is_skipped: bool = False
    """Whether the user said so."""

    def to_json(self) -> dict[str, Any]:
        """What stands in the place of a report."""
        return {"verdict": "skipped" if self.is_skipped else "not applicable", "reason": self.reason}
