"""The verb: adapters and a base in, a binding or all misfits out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lora_deploy.adapter import Adapter, Experts, ModuleUpdate, Orientation
from lora_deploy.checkpoint import Checkpoint
from lora_deploy.errors import Finding, IncompatibleAdapterError, Severity
from lora_deploy.tensors import Region
from lora_deploy.validate.binding import Binding, BindOptions


def bind(adapters: Sequence[Adapter], checkpoint: Checkpoint, options: BindOptions | None = None) -> Binding:
    """Bind adapters, in order, to a base.

    Raises:
        IncompatibleAdapterError: Some updates do not fit; all of them are in ``findings``.
    """
    options = options or BindOptions()
    updates: dict[str, list[ModuleUpdate]] = {}
    findings: list[Finding] = []
    for i, adapter in enumerate(adapters):
        for module_update in adapter.updates:
            spec = checkpoint.tensors.get(module_update.target)
            if spec is None or isinstance(module_update.update, Experts):
                findings.append(_error("target-missing", module_update.target, "not in base"))
                continue
            update = module_update.update
            if options.weights and options.weights[i] != 1:
                update = update.weighted(options.weights[i])
            region = Region.whole(spec.shape)
            if update.shape != (region.n_rows, region.n_cols):
                findings.append(
                    _error("shape-mismatch", spec.name, f"update is {update.shape}, base is {tuple(spec.shape)}")
                )
                continue
            bound = replace(
                module_update, update=update, region=region, orientation=Orientation.STORED, adapter_index=i
            )
            updates.setdefault(spec.name, []).append(bound)
    if findings:
        raise IncompatibleAdapterError(f"{len(findings)} errors", findings=tuple(findings))
    return Binding(
        checkpoint=checkpoint,
        adapters=tuple(adapters),
        outputs={name: name for name in checkpoint.tensors},
        updates={name: tuple(updates[name]) for name in checkpoint.tensors if name in updates},
        options=options,
    )


def _error(code: str, target: str, message: str) -> Finding:
    return Finding(code=code, severity=Severity.ERROR, target=target, message=message)
