"""``lora-deploy recipe``: begin a recipe, see what one says, list those that come along, print the schema."""

from __future__ import annotations

from pathlib import Path

import click

from lora_deploy.adapters.interface import ReadOptions
from lora_deploy.cli.options import chosen, output_options, read_options
from lora_deploy.cli.screen import Screen
from lora_deploy.errors import LoraDeployError


@click.group(short_help="Begin, show and list recipes.")
def recipe() -> None:
    """Recipes say a whole deployment in one YAML file; lora-deploy run carries it out."""


@recipe.command(short_help="Write a first recipe for an adapter.")
@click.argument("adapter")
@click.option("--base", metavar="BASE", help="The base model. Default: the one that the adapter names.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), metavar="FILE", help="Where to write. Default: print it."
)
@read_options
@output_options
@click.pass_obj
def init(screen: Screen, /, adapter: str, base: str | None, output: Path | None, **choices: object) -> None:
    """Write a commented recipe for ADAPTER, whose base and format it looks up.

    \b
    Example:
      lora-deploy recipe init runs/7 > recipe.yaml
    """  # noqa: D301 - \b is click's mark for text that keeps its lines
    from lora_deploy import pipeline
    from lora_deploy.recipe.starter import starter

    options = chosen(ReadOptions, choices)
    try:
        found = pipeline.inspect(adapter, read_options=options)
    except LoraDeployError as error:
        if error.code != "alpha-unknown":
            raise
        text = starter(adapter=adapter, base=base, needs_alpha=True, summary=error.message)
    else:
        hint = found.base_hint
        named = f"{hint.name}@{hint.revision}" if hint.name and hint.revision else hint.name
        summary = f"{found.name}: {found.format}, {len(found.modules)} tensors change"
        text = starter(adapter=adapter, base=base or named, needs_alpha=False, summary=summary)
    screen.publish({"recipe": text, "output": output})
    if output is None:
        screen.piece(text)
        return
    from lora_deploy.recipe.read import write_new

    write_new(output, text)
    screen.line(f"wrote {output}; next: lora-deploy run {output} --dry-run")


@recipe.command(short_help="Print a recipe resolved, with every default.")
@click.argument("recipe", metavar="RECIPE")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Say something in place of the recipe.")
@output_options
@click.pass_obj
def show(screen: Screen, /, recipe: str, overrides: tuple[str, ...]) -> None:
    """Print RECIPE, a file or the name of one that comes along, with every default and the cells that it makes."""
    import yaml

    from lora_deploy.recipe.cells import cells_of
    from lora_deploy.recipe.library import find_recipe
    from lora_deploy.recipe.read import read_recipe

    path, folder = find_recipe(recipe)
    read = read_recipe(path, overrides)
    cells = cells_of(read, folder)
    said = read.model_dump(mode="json", by_alias=True)
    screen.publish(
        {"recipe": said, "cells": [{"name": c.name, "folder": c.folder, "targets": c.targets} for c in cells]}
    )
    screen.piece(yaml.safe_dump(said, sort_keys=False, allow_unicode=True, width=100))
    screen.line(f"# {len(cells)} cell{'s' if len(cells) > 1 else ''}: {', '.join(cell.name for cell in cells)}")
    screen.line(f"# stages: {', '.join(read.stages)}")


@recipe.command(short_help="Print the JSON Schema of recipes.")
@click.pass_obj
def schema(screen: Screen, /) -> None:
    """Print what a recipe may say, as JSON Schema: an editor completes from it."""
    from lora_deploy.recipe.schema import schema_text

    screen.piece(schema_text())


@recipe.command("list", short_help="List the recipes that come along.")
@output_options
@click.pass_obj
def list_recipes(screen: Screen, /) -> None:
    """List the recipes that come with the package; lora-deploy run takes their names, too."""
    from lora_deploy.recipe.library import library
    from lora_deploy.recipe.read import read_recipe

    found = {name: read_recipe(path, environment={}) for name, path in library().items()}
    screen.publish({"recipes": {name: {"summary": r.summary, "base": r.base} for name, r in found.items()}})
    screen.fields((name, read.summary) for name, read in found.items())
