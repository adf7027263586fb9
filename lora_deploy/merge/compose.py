"""Compose the merge record from the plan and what was measured."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch

from lora_deploy.adapter import Adapter, ModuleUpdate
from lora_deploy.artifact import Artifact
from lora_deploy.merge.facts import TensorFacts
from lora_deploy.merge.identity import identity_digest
from lora_deploy.merge.plan import MergePlan, PlannedTensor, Treatment
from lora_deploy.merge.record import (
    SCHEMA,
    MergeRecord,
    RecordedAdapter,
    RecordedBase,
    RecordedCost,
    RecordedFile,
    RecordedFinding,
    RecordedOrigin,
    RecordedTensor,
    RecordedUpdate,
)
from lora_deploy.updates.interface import Update
from lora_deploy.updates.low_rank import LowRank


def compose_record(
    plan: MergePlan,
    identity: Mapping[str, Any],
    artifacts: Sequence[Artifact],
    facts: Mapping[str, TensorFacts],
    cost: Mapping[str, Any],
) -> MergeRecord:
    """Put together everything that ``merge.json`` says."""
    binding, origin = plan.binding, compose_origin(plan, identity)
    changed = [tensor for tensor in plan.tensors if tensor.treatment is not Treatment.UNTOUCHED]
    return MergeRecord(
        schema=SCHEMA,
        digest=identity_digest(identity),
        versions=origin.versions,
        base=origin.base,
        adapters=origin.adapters,
        options=origin.options,
        config_edits=json.loads(json.dumps(dict(binding.config_edits))),
        excluded=binding.excluded,
        findings=origin.findings,
        artifacts=tuple(RecordedFile(path=str(a.path), n_bytes=a.n_bytes, sha256=a.sha256) for a in artifacts),
        tensors={tensor.spec.name: _tensor(tensor, facts.get(tensor.spec.name)) for tensor in changed},
        n_untouched=sum(tensor.treatment is Treatment.UNTOUCHED for tensor in plan.tensors),
        cost=RecordedCost(**cost),
    )


def compose_origin(plan: MergePlan, identity: Mapping[str, Any]) -> RecordedOrigin:
    """Say what is merged and how, and where it lies."""
    binding = plan.binding
    weights = binding.options.weights or (1.0,) * len(binding.adapters)
    return RecordedOrigin(
        versions=versions(),
        base=RecordedBase(
            name=binding.checkpoint.ref.name,
            revision=binding.checkpoint.ref.revision,
            root=str(binding.checkpoint.root.absolute()),
            files=tuple(RecordedFile(**file) for file in identity["base"]),
        ),
        adapters=tuple(_adapter(adapter, weight) for adapter, weight in zip(binding.adapters, weights, strict=True)),
        options={
            "read": identity["read_options"],
            "bind": identity["bind_options"],
            "merge": identity["merge_options"],
        },
        findings=tuple(
            RecordedFinding(code=f.code, severity=f.severity.value, target=f.target, message=f.message)
            for f in plan.findings
        ),
    )


def versions() -> dict[str, str]:
    """What computed the bytes: kinds defined in float64 promise the same bytes per torch build and instruction set."""
    return {
        "lora-deploy": version("lora-deploy"),
        "torch": torch.__version__,
        "safetensors": version("safetensors"),
        "python": platform.python_version(),
        "platform": f"{sys.platform}-{platform.machine()}",
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
    }


def _adapter(adapter: Adapter, weight: float) -> RecordedAdapter:
    return RecordedAdapter(
        name=adapter.name,
        path=str(adapter.path.absolute()),
        format=adapter.format,
        sha256=adapter.sha256,
        config_sha256=adapter.config_sha256,
        base_name=adapter.base_hint.name,
        base_revision=adapter.base_hint.revision,
        weight=weight,
    )


def _tensor(tensor: PlannedTensor, facts: TensorFacts | None) -> RecordedTensor:
    return RecordedTensor(
        treatment=tensor.treatment.value,
        dtype=tensor.spec.dtype.long_name,
        shape=tensor.spec.shape,
        source=tensor.source.name if tensor.source else None,
        updates=tuple(_update(entry) for entry in tensor.updates),
        max_abs=facts.max_abs if facts else 0.0,
        delta_norm=facts.delta_norm if facts else None,
        weight_norm=facts.weight_norm if facts else None,
        survival=facts.survival if facts else None,
        n_underflowed=facts.n_underflowed if facts else 0,
    )


def _update(entry: ModuleUpdate) -> RecordedUpdate:
    update = entry.update
    low_rank = update if isinstance(update, LowRank) else None
    return RecordedUpdate(
        kind=update.kind if isinstance(update, Update) else "experts",
        adapter=entry.adapter_index,
        keys=entry.keys,
        rank=low_rank.rank if low_rank else None,
        scale=low_rank.scale.value if low_rank else None,
        scale_source=low_rank.scale.source if low_rank else None,
    )
