"""Copies of base tensors that an adapter file holds below its own changes.

A copy of the base's shape is never a result, only evidence: where it differs, the adapter was trained on another base,
or the file already holds the update (loralib's ``eval()``). With other rows it is the base as training resized it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lora_deploy.adapter import Adapter, ModuleUpdate
from lora_deploy.names import AmbiguousNameError
from lora_deploy.tensors import TensorSpec
from lora_deploy.updates.replacement import Replacement
from lora_deploy.validate.base import Base
from lora_deploy.validate.findings import Findings

_COMPARED_ELEMENTS = 1 << 22
"""Of each copy: enough to tell another base, without reading all of a full state dict."""


def resized_copies(adapter: Adapter, base: Base, findings: Findings) -> Iterator[ModuleUpdate]:
    """Yield the copies that say what the base's own values become, and compare the others with the base."""
    different: list[ModuleUpdate] = []
    for copy in adapter.base_copies:
        assert isinstance(copy.update, Replacement)  # noqa: S101 - so says Adapter.base_copies
        spec = _spec(copy.target, base)
        if spec is None or spec.shape != tuple(copy.update.values.shape):
            if spec is None or spec.shape[1:] == tuple(copy.update.values.shape[1:]):
                yield copy
        elif not _is_equal(copy.update, spec, base):
            different.append(copy)
    if different:
        findings.warn(
            "base-differs",
            different[0].target,
            f"the file's copies of {len(different)} of {len(adapter.base_copies)} base tensors are not this base's: "
            "another base, or a file that already holds the update",
            [key for copy in different[:1] for key in copy.keys],
        )


def _spec(name: str, base: Base) -> TensorSpec | None:
    try:
        parts = base.index.find(name)
    except AmbiguousNameError:
        return None
    if parts is None:
        tie = base.absent_member(name)
        return base.spec(tie.member) if tie else None
    return base.specs[parts[0].tensor] if parts[0].region is None and len(parts) == 1 else None


def _is_equal(copy: Replacement, spec: TensorSpec, base: Base) -> bool:
    if not spec.dtype.is_floating or not spec.n_elements:
        return True
    n = min(spec.n_elements, _COMPARED_ELEMENTS)
    stored = torch.frombuffer(
        base.read(spec.name, 0, n * spec.dtype.n_bytes), dtype=getattr(torch, spec.dtype.long_name)
    )
    values = copy.values.reshape(-1)[:n]
    return bool((stored.to(values.dtype) == values).all())
