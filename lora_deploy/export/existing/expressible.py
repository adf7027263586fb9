"""Whether an existing export can hold what adapters make of its weights: the graph stays as it is."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lora_deploy.errors import Finding, IncompatibleAdapterError, Severity
from lora_deploy.export.existing.base import OnnxBase, Stored, read_view
from lora_deploy.validate import Binding
from lora_deploy.validate.findings import misfit_message
from lora_deploy.validate.sharing import are_equal

_COMPARED_BYTES = 1 << 24


def require_expressible(binding: Binding, base: OnnxBase) -> None:
    """Check that every change is one of values, where the graph has one place for them.

    Raises:
        IncompatibleAdapterError: Something is not; all of it is in ``findings``.
    """
    problems = (*_new_places(binding, base), *_shared_places(binding, base), *_different_copies(binding, base))
    if problems:
        found = (*problems, *binding.findings)
        hint = "this needs another graph: lora-deploy export --onnx --adapter ADAPTER --base CHECKPOINT"
        raise IncompatibleAdapterError(misfit_message(binding.adapters, base, found), findings=found, hint=hint)


def _new_places(binding: Binding, base: OnnxBase) -> Iterator[Finding]:
    for name, source in binding.outputs.items():
        if name not in base.tensors and source is None:
            yield _error("no-place", name, "the adapter adds it, and the graph has no place for it")
        elif name not in base.tensors:
            message = f"the graph reads it from {source}: an adapter on one side of a tied pair cannot be expressed"
            yield _error("tie-inseparable", name, message)
        elif name != source:
            yield _error("layers-replicated", name, f"starts from {source}: the graph has its own layers")
        elif name in binding.shapes:
            found, expected = binding.shapes[name], base.tensors[name].shape
            yield _error("shape-changed", name, f"becomes {list(found)}, the graph was made for {list(expected)}")


def _shared_places(binding: Binding, base: OnnxBase) -> Iterator[Finding]:
    """Find matrices of several modules, of which adapters change some and not others."""
    for names in base.aliases:
        updates = [binding.updates.get(name, ()) for name in names]
        for name, own in zip(names, updates, strict=True):
            if own and not all(are_equal(own, other) for other in updates):
                others = ", ".join(other for other in names if other != name)
                message = f"the graph has one matrix for it and for {others}, which the adapter does not change alike"
                yield _error("tie-inseparable", name, message)


def _different_copies(binding: Binding, base: OnnxBase) -> Iterator[Finding]:
    for name in binding.updates:
        copies = base.views.get(name, ())
        if any(not _are_same(copies[0], other) for other in copies[1:]):
            yield _error("copies-differ", name, f"the export holds {len(copies)} matrices of it that are not equal")


def _are_same(one: Stored, other: Stored) -> bool:
    for start in range(0, one.nbytes, _COMPARED_BYTES):
        stop = min(start + _COMPARED_BYTES, one.nbytes)
        left, right = (np.frombuffer(read_view(view, start, stop), np.uint8) for view in (one, other))
        if not np.array_equal(left, right):
            return False
    return True


def _error(code: str, target: str, message: str) -> Finding:
    return Finding(code=code, severity=Severity.ERROR, target=target, message=message)
