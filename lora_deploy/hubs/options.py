"""What the user may choose about a push; names are those of the hub's own client. No tensor library is imported."""

from __future__ import annotations

from dataclasses import dataclass, field

from lora_deploy.errors import RecipeError


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
    """Replace what is at a target that keeps no history; remove what is of no release of ours."""

    def __post_init__(self) -> None:
        """Refuse what no header can carry: the HTTP library would quote it in its error.

        Raises:
            RecipeError: The token is empty, or holds a space or a control character.
        """
        token = self.token
        if token is not None and not (token and token.isascii() and token.isprintable() and " " not in token):
            raise RecipeError(
                "--token: is empty, or holds a space, a line break or a letter that no token has",
                hint="leave it out to use HF_TOKEN or a login",
            )
        if self.create_pr and self.tag:
            raise RecipeError(
                "--tag and --create-pr: a pull request is no release yet", hint="set the tag once it is merged"
            )
        for name, text in (
            ("--commit-message", self.commit_message),
            ("--revision", self.revision),
            ("--tag", self.tag),
        ):
            if text is not None and not text.strip():
                raise RecipeError(f"{name}: is empty")
