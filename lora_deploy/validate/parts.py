"""The models that one base is made of: components of a pipeline's folder, or parts of a single file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lora_deploy.checkpoint import Checkpoint
from lora_deploy.names.diffusion.single_file import prefixes_of
from lora_deploy.pipeline_layout import SEPARATOR


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """One of them, under its own names."""

    checkpoint: Checkpoint
    prefix: str
    """Before the names of its tensors in the base."""


def models_of(base: Checkpoint) -> dict[str, Model]:
    """Give the models that a base is made of, by component; empty where it is one model itself."""
    if base.components:
        return {name: Model(checkpoint=part, prefix=name + SEPARATOR) for name, part in base.components.items()}
    return {component: _view(base, component, prefix) for component, prefix in prefixes_of(base.tensors).items()}


def _view(base: Checkpoint, component: str, prefix: str) -> Model:
    """See the tensors with a prefix without it; none of these models has layers stored as (in, out)."""
    tensors: Mapping[str, str] = {name.removeprefix(prefix): name for name in base.tensors if name.startswith(prefix)}
    return Model(
        checkpoint=replace(
            base,
            ref=replace(base.ref, name=f"{base.ref.name}{SEPARATOR}{component}", pipeline=base.ref.name),
            tensors={own: replace(base.tensors[name], name=own) for own, name in tensors.items()},
            is_out_in=True,
            findings=(),
        ),
        prefix=prefix,
    )
