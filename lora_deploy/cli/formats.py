"""``lora-deploy formats``: which adapters are read, and what kinds of changes they may hold.

Promise: the tables come from the registries themselves, no reader is imported, and the README's table is this one.
"""

from __future__ import annotations

from collections.abc import Iterable

import click

from lora_deploy.adapters import READERS
from lora_deploy.adapters.tuners import TUNERS
from lora_deploy.cli.options import output_options
from lora_deploy.cli.screen import Screen
from lora_deploy.registry import Entry
from lora_deploy.updates import KINDS

BEGIN, END = "<!-- formats: begin -->", "<!-- formats: end -->"
"""Between these lines a Markdown file holds what ``markdown`` gives."""
REGISTRIES: tuple[tuple[str, str, tuple[Entry, ...]], ...] = (
    ("formats", "format", READERS),
    ("tuners", "PEFT's other tuners", TUNERS),
    ("kinds", "kind", KINDS),
)
"""Name in the document, heading of a member, and the members."""


@click.command(short_help="List the adapter formats and kinds of changes that are known.")
@click.option("--markdown", is_flag=True, help="Print tables in Markdown, as the README has them.")
@output_options
@click.pass_obj
def formats(screen: Screen, /, markdown: bool) -> None:
    """List the formats of adapters that can be read, and the kinds of changes that they may hold.

    A format is recognised by its content: nothing has to be named.
    """
    screen.publish(document())
    if markdown:
        screen.line(as_markdown())
        return
    for number, (name, _, entries) in enumerate(REGISTRIES):
        if number:
            screen.line()
        screen.line(name)
        screen.fields((entry.name, entry.summary) for entry in entries)


def document() -> dict[str, object]:
    """Give what ``--json`` prints."""
    return {
        name: [{"name": entry.name, "summary": entry.summary} for entry in entries] for name, _, entries in REGISTRIES
    }


def as_markdown() -> str:
    """Give the tables between their marks, for the README; of PEFT's tuners, whose names say enough, a list."""
    formats, tuners, kinds = ((heading, entries) for _, heading, entries in REGISTRIES)
    listed = ", ".join(f"`{entry.name}`" for entry in tuners[1])
    return f"{BEGIN}\n{_table(*formats)}\n\n{tuners[0]}: {listed}.\n\n{_table(*kinds)}\n{END}"


def _table(heading: str, entries: Iterable[Entry]) -> str:
    rows = [f"| `{entry.name}` | {_escaped(entry.summary)} |" for entry in entries]
    return "\n".join([f"| {heading} | what it is |", "|---|---|", *rows])


def _escaped(text: str) -> str:
    """Keep what Markdown would take for tags and columns."""
    return text.replace("|", r"\|").replace("<", "&lt;").replace(">", "&gt;")
