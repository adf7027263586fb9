"""What accounts for a tensor that is not what the plan demands. No tensor library is imported."""

from __future__ import annotations

from dataclasses import dataclass

from lora_deploy.evidence.outcome import Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """A mistake, and what it says."""

    outcome: Outcome
    message: str
    factor: float | None = None
    """How many times the delta was added."""
    fraction: float | None = None
    """Part of the telling elements that hold the base's value, [0..1]."""
