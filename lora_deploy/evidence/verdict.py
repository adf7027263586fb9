"""The three things that evidence can say, and the three checks that say them. No tensor library is imported."""

from __future__ import annotations

from enum import StrEnum


class Verdict(StrEnum):
    """What a measurement proves."""

    PASS = "pass"  # noqa: S105 - no password
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"
    """Could not be checked, which is not the same as checked."""


class Check(StrEnum):
    """What is checked about a merged folder."""

    REPLAY = "replay"
    """Every stored byte against the definition of the merge."""
    PARITY = "parity"
    """Outputs against the unmerged model's."""
    LATENCY = "latency"
    """Time of the merged graph against the base's."""
