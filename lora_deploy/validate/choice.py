"""What the user wants changed: ``--include`` and ``--exclude``, patterns of whole tensor names."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Self

from lora_deploy.errors import RecipeError
from lora_deploy.validate.binding import BindOptions


class Choice:
    """Decides name by name, and remembers what it left out."""

    def __init__(self, options: BindOptions) -> None:
        """Decide by these options."""
        self._include, self._exclude = options.include, options.exclude
        self._seen: dict[str, None] = {}
        self._left_out: dict[str, None] = {}
        self._prefix = ""

    def within(self, prefix: str) -> Self:
        """Decide about the tensors of one model of several, by the names that they have in all; memory is shared."""
        inner = copy.copy(self)
        inner._prefix = prefix  # noqa: SLF001 - a copy of this very object
        return inner

    @property
    def left_out(self) -> tuple[str, ...]:
        """Adapter keys that were left out."""
        return tuple(self._left_out)

    def takes(self, name: str, keys: Iterable[str]) -> bool:
        """Decide whether the tensor of this name is to be changed by these keys."""
        name = self._prefix + name
        self._seen[name] = None
        included = not self._include or any(fnmatchcase(name, pattern) for pattern in self._include)
        taken = included and not any(fnmatchcase(name, pattern) for pattern in self._exclude)
        if not taken:
            self._left_out.update(dict.fromkeys(keys))
        return taken

    def check_patterns(self) -> None:
        """Check that every pattern meant something.

        Raises:
            RecipeError: A pattern that no name matched.
        """
        for pattern in (*self._include, *self._exclude):
            if not any(fnmatchcase(name, pattern) for name in self._seen):
                raise RecipeError(
                    f"pattern {pattern!r} matches none of the {len(self._seen)} tensors that the adapter changes",
                    hint=f"patterns match whole tensor names such as {min(self._seen)}" if self._seen else None,
                )
