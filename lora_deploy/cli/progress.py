"""Progress for people: a bar on a terminal, a dated line every few seconds elsewhere. Both write to stderr.

Promise: ``advance`` may come from any thread and costs next to nothing.
"""

from __future__ import annotations

import sys
import threading
import time
from typing import TYPE_CHECKING

import click

from lora_deploy.cli.numbers import format_seconds, format_size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar

    from lora_deploy.merge.progress import Progress

LINE_INTERVAL_S = 5.0


def progress_on_stderr() -> Progress:
    """Choose how to show progress where stderr goes to."""
    return TerminalProgress() if sys.stderr.isatty() else LogProgress()


class TerminalProgress:
    """A bar with bytes, rate and time left, gone when the work is done."""

    def __init__(self) -> None:
        """Show nothing until something starts."""
        self._bar: Bar | None = None

    def start(self, label: str, n_bytes: int, unit: str = "") -> None:
        """Draw an empty bar."""
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        of_bytes = (DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            *((MofNCompleteColumn(), TextColumn(unit, markup=False)) if unit else of_bytes),
            console=_console(),
            transient=True,
        )
        self._bar.add_task(label, total=n_bytes)
        self._bar.start()

    def advance(self, n_bytes: int) -> None:
        """Fill the bar."""
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0], n_bytes)

    def finish(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class LogProgress:
    """A line at the start, one every few seconds, one at the end: for logs."""

    def __init__(self, interval_s: float = LINE_INTERVAL_S) -> None:
        """Write at most one line every ``interval_s`` seconds between start and end."""
        self._interval_s = interval_s
        self._lock = threading.Lock()
        self._label = self._unit = ""
        self._n_bytes = self._n_done = 0
        self._started = self._last = 0.0

    def start(self, label: str, n_bytes: int, unit: str = "") -> None:
        """Say what begins."""
        self._label, self._unit, self._n_bytes, self._n_done = label, unit, n_bytes, 0
        self._started = self._last = time.monotonic()
        log(f"{label}: at most {n_bytes} {unit}" if unit else f"{label}: {format_size(n_bytes)}")

    def advance(self, n_bytes: int) -> None:
        """Say how far it is, if the last line is old enough."""
        with self._lock:
            self._n_done += n_bytes
            now = time.monotonic()
            if now - self._last < self._interval_s:
                return
            self._last = now
            rate = self._n_done / (now - self._started)
        if self._unit:
            log(f"{self._label}: {self._n_done} of at most {self._n_bytes} {self._unit}")
            return
        left = (self._n_bytes - self._n_done) / rate if rate else 0.0
        done = f"{format_size(self._n_done)} of {format_size(self._n_bytes)}"
        log(f"{self._label}: {done}, {format_size(rate)}/s, {format_seconds(left)} left")

    def finish(self) -> None:
        """Say what was done in what time."""
        seconds = time.monotonic() - self._started
        done = f"{self._n_done} {self._unit}" if self._unit else format_size(self._n_done)
        log(f"{self._label}: {done} in {format_seconds(seconds)}")


def _console() -> Console:
    from rich.console import Console

    return Console(stderr=True)


def log(text: str) -> None:
    """Write a line with the time to stderr."""
    click.echo(f"{time.strftime('%H:%M:%S')} {text}", err=True)
