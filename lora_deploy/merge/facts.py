"""What a merged tensor became: norms, survival and range, summed over its blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from lora_deploy.merge.exact import BlockFacts
from lora_deploy.merge.plan import PlannedTensor, Treatment


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorFacts:
    """Figures of one tensor; those that need an update are None without one."""

    max_abs: float
    """Largest finite |W'| as stored."""
    delta_norm: float | None
    """‖Δ‖, Frobenius."""
    weight_norm: float | None
    """‖W‖, Frobenius, of the regions that were merged, before the update."""
    survival: float | None
    """1 - ‖stored - exact‖ / ‖Δ‖, at most 1; negative where rounding took more than the update gave."""
    n_underflowed: int

    @classmethod
    def of(cls, facts: BlockFacts, tensor: PlannedTensor) -> Self:
        """Finish the sums of all blocks of a tensor."""
        is_merged = tensor.treatment is Treatment.MERGED
        delta, weight, error = map(_norm, (facts.delta_square, facts.weight_square, facts.error_square))
        return cls(
            max_abs=facts.max_abs,
            delta_norm=delta if is_merged else None,
            weight_norm=weight if is_merged else None,
            survival=1 - error / delta if is_merged and delta and error is not None else None,
            n_underflowed=facts.n_underflowed,
        )

    def to_json(self) -> dict[str, Any]:
        """Give plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Read back what ``to_json`` gave."""
        return cls(**values)


def _norm(square: float) -> float | None:
    """The root of a sum of squares; None where the squares of huge numbers exceeded float64."""
    return math.sqrt(square) if math.isfinite(square) else None
