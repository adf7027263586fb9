"""What long work tells about itself while it runs. No tensor library is imported.

Promise: progress is for people. It changes no byte and no decision; ``None`` in its place silences it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """Told how much there is to do and how much is done, in bytes unless another unit is named.

    One piece of work at a time: ``start``, any number of ``advance``, ``finish``; then another may start. ``finish`` is
    called on failure and interruption too.
    """

    def start(self, label: str, n_bytes: int, unit: str = "") -> None:
        """Begin work on so many bytes, or ``unit`` (a plural) if given; ``label`` says what it is, such as ``merging``.

        Of a named unit there may turn out to be fewer.
        """
        ...

    def advance(self, n_bytes: int) -> None:
        """Count bytes that are done; may be called from any thread."""
        ...

    def finish(self) -> None:
        """End what was started, whether all of it was done or not."""
        ...


@contextmanager
def reporting(progress: Progress | None, label: str, n_bytes: int, unit: str = "") -> Iterator[Callable[[int], None]]:
    """Report one piece of work from start to finish, whatever happens; gives what to call with what was done."""
    if progress is None:
        yield lambda _: None
        return
    progress.start(label, n_bytes, unit)
    try:
        yield progress.advance
    finally:
        progress.finish()
