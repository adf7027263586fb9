"""Give updates whose modules are named with underscores for dots the names of the base's tensors.

Promise: a name is looked up whole among all modules of the base, in every dialect; two modules that it may mean are an
error, never a choice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from lora_deploy.adapter import ModuleUpdate
from lora_deploy.validate.base import Base
from lora_deploy.validate.choice import Choice
from lora_deploy.validate.findings import Findings


def unflattened(
    updates: Sequence[ModuleUpdate], base: Base, choice: Choice, findings: Findings
) -> Iterator[ModuleUpdate]:
    """Yield the updates whose module is found, under its path; the others become findings."""
    for update in updates:
        module, _, slot = update.target.rpartition(".")
        module = module.replace(".", "_")
        found = _places(module, slot, base)
        if len(found) == 1:
            yield replace(update, target=next(iter(found.values())))
        elif choice.takes(update.target, update.keys):
            if found:
                message = f"with dots for underscores it fits {' and '.join(found.values())}"
                findings.error("ambiguous-target", update.target, message, update.keys)
            else:
                nearest = base.index.nearest_flattened(module)
                hint = f"; nearest: {', '.join(nearest)}" if nearest else ""
                findings.error("target-missing", update.target, f"not in base{hint}", update.keys)


def _places(module: str, slot: str, base: Base) -> dict[str, str]:
    """Give the places that the module may be, and a name of each: dialects agree about most."""
    paths = base.index.unflattened(module)
    found: dict[str, str] = {}
    for path in paths:
        parts = base.index.find(f"{path}.{slot}")
        if parts is not None:
            found.setdefault(repr(parts), f"{path}.{slot}")
    if not found and paths:  # the module is there, without this tensor: let placement say so
        return {"": f"{paths[0]}.{slot}"}
    return found
