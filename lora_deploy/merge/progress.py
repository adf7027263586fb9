"""What long work tells about itself while it runs. No tensor library is imported.

Promise: progress is for people. It changes no byte and no decision; ``None`` in its place silences it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """Told how many bytes there are to do and how many are done.

    One piece of work at a time: ``start``, any number of ``advance``, ``finish``; then another may start. ``finish`` is
    called on failure and interruption too.
    """

    def start(self, label: str, n_bytes: int) -> None:
        """Begin work on ``n_bytes`` bytes; ``label`` says what it is, such as ``merging``."""
        ...

    def advance(self, n_bytes: int) -> None:
        """Count bytes that are done; may be called from any thread."""
        ...

    def finish(self) -> None:
        """End what was started, whether all of it was done or not."""
        ...


@contextmanager
def reporting(progress: Progress | None, label: str, n_bytes: int) -> Iterator[Callable[[int], None]]:
    """Report one piece of work from start to finish, whatever happens; gives what to call with the bytes done."""
    if progress is None:
        yield lambda _: None
        return
    progress.start(label, n_bytes)
    try:
        yield progress.advance
    finally:
        progress.finish()
