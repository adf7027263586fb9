"""Pair planned tensors with stored ones: by name, by another version's name, through a wrapper's prefix, or by sharing.

Promise: a stored tensor stands for one planned tensor, or for several only where the folder's own configuration says
that they are one matrix. What has no partner is missing or extra; nothing is paired by shape.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from lora_deploy.checkpoint import Checkpoint
from lora_deploy.evidence.comparison import Comparison
from lora_deploy.evidence.orders import known_orders
from lora_deploy.evidence.outcome import Outcome, TensorOutcome
from lora_deploy.evidence.replayer import Misses
from lora_deploy.merge.plan import MergePlan, PlannedTensor, Treatment
from lora_deploy.names import AmbiguousNameError, NameIndex, ties_of
from lora_deploy.tensors import TensorSpec

_WRAPPERS = ("base_model.model.", "_orig_mod.", "module.", "model.", "transformer.")
_COMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|position_ids|masked_bias|attn\.bias)$")
"""Buffers that the model computes itself; ``attn.bias`` only as the causal mask that GPT-2 used to save."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pairing:
    """What can be compared, and what needs no comparison to be told."""

    comparisons: tuple[Comparison, ...]
    outcomes: tuple[TensorOutcome, ...]
    """Of what has no partner, or one that cannot be compared."""


def pair(plan: MergePlan, merged: Checkpoint) -> Pairing:
    """Find the stored tensor of every planned one, and the planned one of every other stored tensor."""
    planned = {tensor.spec.name: tensor for tensor in plan.tensors}
    partners = _by_name(plan, planned, merged)
    shared = _shared(planned, merged)
    outcomes: list[TensorOutcome] = []
    comparisons: list[Comparison] = []
    for name, tensor in planned.items():
        stored = partners.get(name) or next((partners[n] for n in shared.get(name, ()) if n in partners), None)
        if stored is None:
            outcomes.append(_missing(name, tensor))
        else:
            _add(name, tensor, merged.tensors[stored], comparisons, outcomes)
    for name in [n for n in merged.tensors if n not in set(partners.values())]:
        twin = next((planned[n] for n in shared.get(name, ()) if n in planned), None)
        if twin is not None:
            _add(name, twin, merged.tensors[name], comparisons, outcomes)
        else:
            outcomes.append(_extra(name, merged.tensors[name]))
    return Pairing(comparisons=tuple(comparisons), outcomes=tuple(outcomes))


def _by_name(plan: MergePlan, planned: Mapping[str, PlannedTensor], merged: Checkpoint) -> dict[str, str]:
    partners = {name: name for name in planned if name in merged.tensors}
    taken = set(partners)
    index = NameIndex(merged.tensors, plan.config)
    for name in planned:
        if name in partners:
            continue
        found = _renamed(name, index) or _wrapped(name, merged)
        if found is not None and found not in taken:
            partners[name] = found
            taken.add(found)
    return partners


def _renamed(name: str, index: NameIndex) -> str | None:
    """Name of the same whole tensor in another version's dialect."""
    try:
        parts = index.find(name) or ()
    except AmbiguousNameError:
        return None
    whole = [part.tensor for part in parts if part.region is None and part.rows is None]
    return whole[0] if len(parts) == len(whole) == 1 else None


def _wrapped(name: str, merged: Checkpoint) -> str | None:
    """Name of the tensor in a file that a wrapper was saved to, or that was saved without its head."""
    module, _, slot = name.rpartition(".")
    for wrapper in _WRAPPERS:
        for candidate in (wrapper + name, name.removeprefix(wrapper), f"{wrapper}{module}.base_layer.{slot}"):
            if candidate != name and candidate in merged.tensors:
                return candidate
    return None


def _shared(planned: Mapping[str, PlannedTensor], merged: Checkpoint) -> dict[str, list[str]]:
    """Names that are one matrix by the folder's own configuration, both ways."""
    shared: dict[str, list[str]] = {}
    for specs in ({name: tensor.spec for name, tensor in planned.items()}, merged.tensors):
        for tie in ties_of(NameIndex(specs, merged.config), specs, merged.config):
            shared.setdefault(tie.source, []).append(tie.member)
            shared.setdefault(tie.member, []).append(tie.source)
    return shared


def _add(
    name: str,
    tensor: PlannedTensor,
    stored: TensorSpec,
    comparisons: list[Comparison],
    outcomes: list[TensorOutcome],
) -> None:
    spec = tensor.spec
    if stored.shape != spec.shape:
        is_turned = stored.shape == spec.shape[::-1]
        message = f"found {list(stored.shape)}, expected {list(spec.shape)}{': stored transposed' if is_turned else ''}"
        outcomes.append(TensorOutcome(name=name, outcome=Outcome.WRONG_SHAPE, message=message))
        return
    if stored.dtype is not spec.dtype and not (stored.dtype.is_floating and spec.dtype.is_floating):
        message = f"found {stored.dtype.value}, expected {spec.dtype.value}"
        outcomes.append(TensorOutcome(name=name, outcome=Outcome.WRONG_DTYPE, message=message))
        return
    found = _in_dtype_of(stored, tensor)
    orders = dict.fromkeys(known_orders(found), Misses())
    comparisons.append(Comparison(name=name, tensor=found, stored=stored, orders=orders))


def _in_dtype_of(stored: TensorSpec, tensor: PlannedTensor) -> PlannedTensor:
    """Plan the tensor in the dtype that was found."""
    n_bytes = tensor.spec.n_elements * stored.dtype.n_bytes
    spec = replace(tensor.spec, dtype=stored.dtype, start=0, stop=n_bytes)
    treatment = tensor.treatment
    if treatment in {Treatment.UNTOUCHED, Treatment.CAST} and tensor.source is not None:
        treatment = Treatment.UNTOUCHED if tensor.source.dtype is stored.dtype else Treatment.CAST
    return replace(tensor, spec=spec, treatment=treatment)


def _missing(name: str, tensor: PlannedTensor) -> TensorOutcome:
    if _is_computed(name, tensor.spec):
        return TensorOutcome(name=name, outcome=Outcome.IGNORED, message="absent: the model computes it")
    spec = tensor.spec
    return TensorOutcome(
        name=name, outcome=Outcome.MISSING, message=f"expected {spec.dtype.value} {list(spec.shape)}, found none"
    )


def _extra(name: str, stored: TensorSpec) -> TensorOutcome:
    if _is_computed(name, stored):
        return TensorOutcome(name=name, outcome=Outcome.IGNORED, message="the model computes it")
    message = f"found {stored.dtype.value} {list(stored.shape)}, expected none"
    return TensorOutcome(name=name, outcome=Outcome.EXTRA, message=message)


def _is_computed(name: str, spec: TensorSpec) -> bool:
    match = _COMPUTED.search(name)
    return match is not None and (match[2] != "attn.bias" or len(spec.shape) == 4)
