"""Where commands print: results on stdout, as tables or as one JSON document; progress and errors on stderr.

Promise: with ``--json`` stdout gets one document, whatever happens; nothing is cut off to fit a width; there are no
escape sequences where there is no terminal.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import click

from lora_deploy.cli.progress import progress_on_stderr
from lora_deploy.errors import Finding, IncompatibleAdapterError, LoraDeployError, Severity

if TYPE_CHECKING:
    from lora_deploy.merge.progress import Progress

_UNLIMITED_COLUMNS = 1 << 20
_MAX_FINDINGS = 20
_COLORS = {Severity.ERROR: "red", Severity.WARN: "yellow", Severity.NOTE: "cyan"}


def document_of(error: LoraDeployError) -> dict[str, object]:
    """Say an error to a machine."""
    return {"code": error.code, "message": error.message, "hint": error.hint}


class Screen:
    """What one command prints."""

    def __init__(self, *, as_json: bool = False) -> None:
        """Print tables, or one document."""
        self.as_json = as_json
        self.is_quiet = False
        self.exit_code = 0
        """Status of a command that ends without an error of its own."""
        self.resumes = ""
        """What an interrupted command leaves to resume; set by commands that do."""
        self._document: dict[str, object] = {}

    @property
    def shows_text(self) -> bool:
        """Whether lines and tables are printed at all."""
        return not (self.as_json or self.is_quiet)

    def publish(self, document: Mapping[str, object]) -> None:
        """Set what ``--json`` prints; values may be dataclasses, models, paths and enums."""
        self._document |= document

    def line(self, text: str = "") -> None:
        """Print a line."""
        if self.shows_text:
            click.echo(text)

    def piece(self, text: str) -> None:
        """Print text at once, as part of a line."""
        if self.shows_text:
            click.echo(text, nl=False)
            sys.stdout.flush()

    def fields(self, rows: Iterable[tuple[str, str]]) -> None:
        """Print names and values in two columns."""
        rows = list(rows)
        width = max((len(name) for name, _ in rows), default=0)
        for name, value in rows:
            self.line(f"  {name:{width}}  {value}")

    def table(self, headers: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Print columns: the first holds names and is folded where the terminal is too narrow, the others numbers."""
        if not self.shows_text:
            return
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
        table.add_column(Text(headers[0]), overflow="fold")
        for header in headers[1:]:
            table.add_column(Text(header), justify="right", no_wrap=True)
        for row in rows:
            table.add_row(*map(Text, row))
        width = None if sys.stdout.isatty() else _UNLIMITED_COLUMNS
        console = Console(width=width, highlight=False)
        with console.capture() as captured:
            console.print(table)
        for line in captured.get().splitlines():
            self.line(line.rstrip())

    def findings(self, findings: Iterable[Finding]) -> None:
        """Print what was noticed, gravest first."""
        everything = sorted(findings, key=lambda finding: list(_COLORS).index(finding.severity))
        ordered = everything[:_MAX_FINDINGS]
        width = max((len(finding.code) for finding in ordered), default=0)
        for finding in ordered:
            severity = click.style(f"{finding.severity.value:5}", fg=_COLORS[finding.severity])
            self.line(f"  {severity} {finding.code:{width}}  {finding.target}: {finding.message}")
            if finding.source:
                self.line(f"  {'':5} {'':{width}}  from {finding.source}")
        if len(everything) > len(ordered):
            self.line(f"  … and {len(everything) - len(ordered)} more (--json lists all)")

    def progress(self) -> Progress | None:
        """Give what long work tells its progress to; None with ``-q``."""
        return None if self.is_quiet else progress_on_stderr()

    def fail(self, error: LoraDeployError) -> None:
        """Print an error and what to do about it."""
        said = document_of(error)
        if isinstance(error, IncompatibleAdapterError):
            said["findings"] = error.findings
        self._fail(said)

    def fail_usage(self, error: click.ClickException) -> None:
        """Put a usage error into the document; click itself prints it on stderr."""
        self.publish({"error": {"code": "usage", "message": error.format_message(), "hint": None}})

    def fail_interrupted(self) -> None:
        """Say that the user stopped the work."""
        self._fail({"code": "interrupted", "message": f"interrupted{self.resumes}", "hint": None})

    def fail_bug(self, error: Exception) -> None:
        """Keep the traceback of what nobody foresaw."""
        traceback.print_exception(error)
        hint = "this is a bug in lora-deploy: please report it with the traceback"
        self._fail({"code": "bug", "message": f"{type(error).__name__}: {error}", "hint": hint})

    def close(self) -> None:
        """Print the document, if one was asked for."""
        if self.as_json:
            from pydantic_core import to_json

            text = to_json(self._document, indent=2, inf_nan_mode="null", by_alias=True).decode()
            click.echo(text)
        sys.stdout.flush()

    def _fail(self, said: dict[str, object]) -> None:
        self.publish({"error": said})
        click.echo(f"{click.style('error:', fg='red', bold=True)} {said['message']}", err=True)
        if said["hint"]:
            click.echo(f"{click.style('hint:', bold=True)} {said['hint']}", err=True)
