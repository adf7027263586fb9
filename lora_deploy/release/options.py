"""What the user may choose about a release. No tensor library is imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Acceptance:
    """Evidence that is missing or cannot tell, and that a person took upon themselves."""

    code: str
    """Such as ``parity-inconclusive``."""
    because: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseOptions:
    """How a release is made."""

    license: str | None = None
    """Licence to state in place of the base's."""
    card_template: Path | None = None
    """Jinja template of text for the card."""
    sign_key: Path | None = None
    """Private elliptic key, in PEM, to sign with."""
    sign_certificate: Path | None = None
    """The key's certificate, in PEM, then those of its issuers."""
    accepted: tuple[Acceptance, ...] = ()
    """Evidence that may be missing or unclear, and why."""
    recipe: Mapping[str, Any] | None = None
    """What the recipe said that decides the content, where there was one."""
    fresh: bool = False
    """Replace another release at the output."""
