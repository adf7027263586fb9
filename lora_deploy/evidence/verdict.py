"""The three things that evidence can say. No tensor library is imported."""

from __future__ import annotations

from enum import StrEnum


class Verdict(StrEnum):
    """What a measurement proves."""

    PASS = "pass"  # noqa: S105 - no password
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"
    """Could not be checked, which is not the same as checked."""
