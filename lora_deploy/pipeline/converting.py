"""Read an adapter, settle with its base what only that tells, and write it in another format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import fspath
from pathlib import Path

from lora_deploy.adapter import BaseHint
from lora_deploy.adapters.interface import ReadOptions
from lora_deploy.artifact import Artifact
from lora_deploy.convert import TARGETS
from lora_deploy.convert.modules import Module, modules_in_base, modules_of
from lora_deploy.errors import RecipeError
from lora_deploy.pipeline.merging import validate
from lora_deploy.references import Reference, read_named
from lora_deploy.validate import BindOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """An adapter in another format."""

    path: Path
    format: str
    n_modules: int
    artifacts: tuple[Artifact, ...]


def convert(
    adapter: Reference,
    to: str,
    out: Path | None = None,
    *,
    base: Reference | None = None,
    read_options: ReadOptions | None = None,
    bind_options: BindOptions | None = None,
    dequantize: bool = False,
) -> Converted:
    """Write an adapter in the format ``to``; with a base, under its names.

    Raises:
        RecipeError: No such format, or one that cannot hold what the adapter does.
        InputError: The file is not an adapter that can be read.
        IncompatibleAdapterError: It does not fit the base.
        OutputExistsError: Something is in the way.
        MergeError: A file cannot be written.
    """
    targets = {entry.name: entry for entry in TARGETS}
    if to not in targets:
        raise RecipeError(f"--to {to}: no such format", hint=f"it is one of {', '.join(targets)}")
    read = read_named(adapter, read_options)
    if base is None:
        modules, hint = modules_of(read), read.base_hint
    else:
        binding = validate(
            adapter, base=base, read_options=read_options, bind_options=bind_options, dequantize=dequantize
        )
        modules, hint = modules_in_base(binding), BaseHint(name=fspath(base))
    if not modules:
        raise RecipeError(f"{read.path}: nothing is left to convert")
    place = out or Path(f"{read.name}-{to}" + (".safetensors" if to == "kohya" else ""))
    write: Callable[[Path, Sequence[Module], BaseHint], tuple[Artifact, ...]] = targets[to].load()
    return Converted(path=place, format=to, n_modules=len(modules), artifacts=write(place, modules, hint))
