"""An entry of a registry: a member of an axis of growth, named without importing it.

Promise: listing names and summaries imports nothing; ``load`` imports one module.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One member: its name, what it is in one line, and where its code is."""

    name: str
    summary: str
    path: str
    """``module:attribute``."""

    def load(self) -> Any:  # noqa: ANN401 - the registry's owner knows the type
        """Import the module and give the attribute."""
        module, _, attribute = self.path.partition(":")
        return getattr(import_module(module), attribute)
