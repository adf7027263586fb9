"""Updates that depend on all adapted layers of a model: their sizes from the base, their order from its class."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from lora_deploy.adapter import Adapter, Layer, ModelWide
from lora_deploy.errors import UnmergeableAdapterError
from lora_deploy.names import AmbiguousNameError
from lora_deploy.validate.base import Base
from lora_deploy.validate.findings import Findings
from lora_deploy.validate.module_order import layers_in_order
from lora_deploy.validate.shapes import fits, sides_of


def resolved(adapter: Adapter, base: Base, findings: Findings) -> Adapter:
    """Give the adapter with the updates that only the whole model tells; what cannot be known is a finding."""
    wide = adapter.model_wide
    if wide is None:
        return adapter
    try:
        layers = _in_order(wide, base) if wide.needs_order else tuple(_sized(wide, adapter, base))
        updates = tuple(wide.updates(layers))
    except UnmergeableAdapterError as error:
        hint = f" ({error.hint})" if error.hint else ""
        findings.error("model-unknown", adapter.name, f"{wide.reason}: {error.message}{hint}", wide.keys)
        updates = ()
    return replace(adapter, updates=(*adapter.updates, *updates), model_wide=None)


def _sized(wide: ModelWide, adapter: Adapter, base: Base) -> Iterator[Layer]:
    """Look every adapted layer's size up in the base's tensor table.

    Raises:
        UnmergeableAdapterError: One is not there, or which side is which cannot be known.
    """
    for path, known in wide.paths.items():
        try:
            parts = base.index.find(f"{path}.weight")
        except AmbiguousNameError as error:
            raise UnmergeableAdapterError(f"{path} {error}") from error
        if parts is None or len(parts) != 1:
            nearest = base.index.nearest(f"{path}.weight")
            raise UnmergeableAdapterError(
                f"{path}.weight is not in base" + (f"; nearest: {', '.join(nearest)}" if nearest else "")
            )
        spec = base.specs[parts[0].tensor]
        region = parts[0].region or spec.region
        sides = {side for side in sides_of(spec.name, region, adapter, base) if fits(known, side)}
        if len(sides) != 1:
            raise UnmergeableAdapterError(
                f"{path}: base is {tuple(spec.shape)}, the file shows (out, in) = {known}: "
                + ("which side is which is not known" if sides else "they do not fit")
            )
        ((n_out, n_in),) = sides
        yield Layer(path=path, n_out=n_out, n_in=n_in)


def _in_order(wide: ModelWide, base: Base) -> tuple[Layer, ...]:
    """Order the adapted layers as the model's class creates them.

    Raises:
        UnmergeableAdapterError: The class cannot be built, or does not have one of them.
    """
    model = layers_in_order(base.config)
    if wide.is_target is not None:
        return tuple(layer for layer in model.linear if wide.is_target(layer.path))
    paths = {base.index.canonical(f"{path}.weight"): path for path in wide.paths}
    layers = {layer.path: layer for layer in (*model.linear, *model.embeddings)}
    canonical = {path: base.index.canonical(f"{path}.weight") for path in model.order}
    found = [replace(layers[path], path=paths[name]) for path, name in canonical.items() if name in paths]
    missing = sorted({*wide.paths} - {layer.path for layer in found})
    if missing:
        raise UnmergeableAdapterError(f"the base's class has no layer {missing[0]}")
    return tuple(found)
