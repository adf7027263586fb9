"""A text model's adapter on a base that holds such a model among others: legal only where the user says so.

The names of a text model (``model.layers.0…``) mean nothing in a vision-language base, whose language model has them
under a prefix (``language_model.layers.0…``). That the two models are one cannot be told from names and shapes, so
nothing is moved unless ``--into-language-model`` says so, and then everything but the head is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from lora_deploy.adapter import Adapter, Experts, ModuleUpdate
from lora_deploy.errors import RecipeError
from lora_deploy.names import AmbiguousNameError
from lora_deploy.validate.base import Base

OPTION = "--into-language-model"
_TOWERS = ("language_model", "text_model")
_HEADS = ("lm_head.",)


def into_language_model(adapters: Sequence[Adapter], base: Base) -> tuple[Adapter, ...]:
    """Give every target the name that it has in the base's language model.

    What has none there keeps its own name, and binding says what is wrong with it.

    Raises:
        RecipeError: The base is not made of a language model and others.
    """
    towers = _towers_of(base)
    if not towers or len({name.partition(".")[0] for name in map(base.index.canonical, base.specs)}) < 2:
        raise RecipeError(
            f"{OPTION}: {base.checkpoint.ref.name} holds no language model among other parts",
            hint="leave it out: the names of a text model are its own",
        )
    return tuple(
        replace(
            adapter,
            updates=tuple(_moved(update, base) for update in adapter.updates),
            base_copies=tuple(_moved(copy, base) for copy in adapter.base_copies),
        )
        for adapter in adapters
    )


def name_in_language_model(name: str, base: Base, *, is_stack: bool = False) -> str | None:
    """Find what a text model's name is called in the base's language model; None where it is nothing there."""
    canonical = base.index.canonical(name)
    if canonical.startswith(tuple(f"{tower}." for tower in _TOWERS)):
        return None
    if canonical.startswith(_HEADS) and _is_there(canonical, base, is_stack=False):
        return None
    return next((found for found in _candidates(canonical, base) if _is_there(found, base, is_stack=is_stack)), None)


def _is_there(name: str, base: Base, *, is_stack: bool) -> bool:
    try:
        found = base.index.parameters_of(name) if is_stack else base.index.find(name)
    except AmbiguousNameError:
        return False
    return bool(found) or base.absent_member(name) is not None


def _candidates(canonical: str, base: Base) -> Iterator[str]:
    """A language model is kept without its head, or whole."""
    for tower in _towers_of(base):
        yield f"{tower}.{canonical}"
        yield f"{tower}.model.{canonical}"


def _towers_of(base: Base) -> list[str]:
    names = [base.index.canonical(name) for name in base.specs]
    return [tower for tower in _TOWERS if any(name.startswith(f"{tower}.") for name in names)]


def _moved(update: ModuleUpdate, base: Base) -> ModuleUpdate:
    name = name_in_language_model(update.target, base, is_stack=isinstance(update.update, Experts))
    return update if name is None else replace(update, target=name)
