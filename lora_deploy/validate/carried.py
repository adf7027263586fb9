"""One state dict that holds base and adapter: as a base, it is what is left without the adapter's own tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lora_deploy.adapter import Adapter
from lora_deploy.checkpoint import Checkpoint
from lora_deploy.updates.replacement import Replacement


def without_adapter(adapters: Sequence[Adapter], checkpoint: Checkpoint) -> tuple[tuple[Adapter, ...], Checkpoint]:
    """Where an adapter's own file is the base, keep in each what is its own; else give both as they are.

    Copies of base tensors, and whole tensors that the file holds, are the base then; they get the names that the
    adapter means by them (``x.base_layer.weight`` becomes ``x.weight``).
    """
    carrier = next((adapter for adapter in adapters if _is_carrier(adapter, checkpoint)), None)
    if carrier is None:
        return tuple(adapters), checkpoint
    whole = [update for update in carrier.updates if isinstance(update.update, Replacement)]
    names = {key: item.target for item in (*carrier.base_copies, *whole) for key in item.keys}
    # A pickle's wrapping level is gone once it is converted; the keys below it are the same.
    tensors = {names[key]: replace(spec, name=names[key]) for key, spec in checkpoint.tensors.items() if key in names}
    own = tuple(update for update in carrier.updates if not isinstance(update.update, Replacement))
    stripped = replace(carrier, updates=own, base_copies=())
    return (
        tuple(stripped if adapter is carrier else adapter for adapter in adapters),
        replace(checkpoint, tensors=tensors),
    )


def _is_carrier(adapter: Adapter, checkpoint: Checkpoint) -> bool:
    if not adapter.base_copies:
        return False
    own = adapter.path.resolve()
    opened = {(checkpoint.root / file).resolve() for file in checkpoint.files}
    return own in opened or Path(checkpoint.ref.name).resolve() == own
