"""Faults that a hub commits on request: at which call, how often, and what happens."""

from __future__ import annotations

import re
from dataclasses import dataclass, field


@dataclass
class Fault:
    """``method`` and ``path`` say where; of the calls that match, ``times`` are hit after the first ``after``."""

    method: str
    path: str
    status: int = 0
    """Answer with this, in place of doing it; 0 does it."""
    headers: dict[str, str] = field(default_factory=dict)
    text: str = "planted"
    lose_answer: bool = False
    """Do it, then cut the connection."""
    abort_after: int | None = None
    """Cut the connection once so many bytes of the body have come."""
    fail_after: int | None = None
    """Answer 500 once so many bytes of the body have come."""
    hang_seconds: float = 0.0
    corrupt: bool = False
    """Keep one byte of the object wrongly, after it was checked."""
    after: int = 0
    times: int = 1
    seen: int = 0
    hits: int = 0

    def strikes(self, method: str, path: str) -> bool:
        if method != self.method or not re.search(self.path, path):
            return False
        self.seen += 1
        if self.seen <= self.after or self.hits >= self.times:
            return False
        self.hits += 1
        return True
