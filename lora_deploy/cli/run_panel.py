"""What ``lora-deploy run`` shows while it works: one live panel on a terminal, dated lines elsewhere. Both on stderr.

Each is told of stages as they begin and end, and of progress within them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

from lora_deploy.cli.numbers import format_seconds, format_size
from lora_deploy.cli.progress import LogProgress, log

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live
    from rich.progress import Progress as Bar

    from lora_deploy.pipeline.outcomes import Outcome
    from lora_deploy.recipe.stages import Stage

_COLORS = {"pass": "green", "fail": "red", "inconclusive": "yellow"}


class RunLog(LogProgress):
    """A dated line where a stage begins or ends, and every few seconds between."""

    def __enter__(self) -> Self:
        """Say nothing yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """Say nothing more."""

    def begin(self, cell: str, stage: Stage) -> None:
        """Say what begins."""
        log(f"{cell} {stage}: begins")

    def end(self, outcome: Outcome) -> None:
        """Say how it ended."""
        done = ", unchanged" if outcome.was_done else ""
        seconds = format_seconds(outcome.seconds)
        log(f"{outcome.cell} {outcome.stage}: {outcome.verdict}{done} in {seconds}: {outcome.figure}")


class RunPanel:
    """A table of cells and stages that fills up, with a bar for the work at hand."""

    def __init__(self, cells: Sequence[str], stages: Sequence[Stage]) -> None:
        """Lay out the table."""
        from rich.console import Console
        from rich.live import Live
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._cells, self._stages = cells, stages
        self._marks: dict[tuple[str, str], str] = {}
        self._bar: Bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[amount]}", markup=False),
            TimeElapsedColumn(),
        )
        self._unit = ""
        self._live: Live = Live(
            get_renderable=self._table, console=Console(stderr=True), refresh_per_second=4, transient=True
        )

    @classmethod
    def if_terminal(cls, cells: Sequence[str], stages: Sequence[Stage]) -> Self | None:
        """Make a panel, if stderr goes to a terminal."""
        return cls(cells, stages) if sys.stderr.isatty() else None

    def __enter__(self) -> Self:
        """Show the panel."""
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Take it away."""
        self._live.stop()

    def begin(self, cell: str, stage: Stage) -> None:
        """Mark a stage as being worked on."""
        self._marks[cell, stage] = "[cyan]…[/]"

    def end(self, outcome: Outcome) -> None:
        """Mark how a stage ended."""
        self.finish()
        said = "unchanged" if outcome.was_done else f"{outcome.verdict} {format_seconds(outcome.seconds)}"
        self._marks[outcome.cell, outcome.stage] = f"[{_COLORS[outcome.verdict]}]{said}[/]"

    def start(self, label: str, n_bytes: int, unit: str = "") -> None:
        """Draw an empty bar."""
        self.finish()
        self._unit = unit
        self._bar.add_task(label, total=n_bytes, amount="")

    def advance(self, n_bytes: int) -> None:
        """Fill the bar."""
        for task in self._bar.tasks:
            done = task.completed + n_bytes
            amount = f"{done:.0f} {self._unit}" if self._unit else format_size(done)
            self._bar.update(task.id, advance=n_bytes, amount=amount)

    def finish(self) -> None:
        """Take the bar away."""
        for task in self._bar.task_ids:
            self._bar.remove_task(task)

    def _table(self) -> RenderableType:
        from rich.console import Group
        from rich.markup import escape
        from rich.table import Table

        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("")
        for stage in self._stages:
            table.add_column(stage.value)
        for cell in self._cells:
            marks = (self._marks.get((cell, stage), "[dim]·[/]") for stage in self._stages)
            table.add_row(escape(cell), *marks)
        return Group(table, self._bar)
