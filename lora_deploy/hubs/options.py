"""What the user may choose about a push; names are those of the hub's own client. No tensor library is imported."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class PushOptions:
    """How a release is published."""

    revision: str | None = None
    """Branch; None is the hub's default."""
    private: bool | None = None
    """Visibility of a repository that is made; None is private."""
    create_pr: bool = False
    """Propose the commit in place of making it."""
    tag: str | None = None
    """Tag to set on what was pushed."""
    token: str | None = field(default=None, repr=False)
    """Never printed, logged or written."""
    commit_message: str | None = None
    yes: bool = False
    """Replace what is at a target that keeps no history."""
