"""Findings that readers of several formats make."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lora_deploy.adapter import ModuleUpdate
from lora_deploy.adapters.factors import is_zero
from lora_deploy.errors import Finding, Severity
from lora_deploy.updates.dora import Dora
from lora_deploy.updates.low_rank import LowRank


def warn(code: str, target: str, message: str) -> Finding:
    """Make a warning."""
    return Finding(code=code, severity=Severity.WARN, target=target, message=message)


def note(code: str, target: str, message: str) -> Finding:
    """Make a note."""
    return Finding(code=code, severity=Severity.NOTE, target=target, message=message)


def untrained(updates: Sequence[ModuleUpdate]) -> Iterator[Finding]:
    """Warn, once, of updates with a factor that is all zero."""
    pairs = [(update.target, found) for update in updates if (found := _factors(update.update)) is not None]
    zero = [target for target, factors in pairs if is_zero(factors)]
    if zero:
        message = f"{len(zero)} of {len(pairs)} modules have a factor that is all zero: they change nothing"
        yield warn("untrained", zero[0], message)


def _factors(update: object) -> LowRank | None:
    if isinstance(update, Dora):
        return _factors(update.inner)
    return update if isinstance(update, LowRank) else None
