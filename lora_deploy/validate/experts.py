"""Low-rank updates of fused experts: which parameter each one is, which way round, and where each expert is stored.

The file names neither the parameters nor the layout. Parameters follow from how deep the wrappers nest (registration
order), checked against shapes; the layout from shapes, and where both axes are equal from the version that trained.
Source: peft 0.17 to 0.21.2, ``tuners/lora/layer.py``, ``ParamWrapper``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lora_deploy.adapter import Adapter, Experts, ModuleUpdate, Orientation
from lora_deploy.names import Part, Stack
from lora_deploy.names.dialects import TRANSPOSED_EXPERTS, TRANSPOSED_ON_DISK
from lora_deploy.updates.low_rank import LowRank
from lora_deploy.validate.base import Base
from lora_deploy.validate.choice import Choice
from lora_deploy.validate.findings import Findings
from lora_deploy.validate.language_model import name_in_language_model

_REGISTRATION = ("gate_up_proj", "gate_proj", "w1", "v1", "up_proj", "w3", "down_proj", "w2")
"""Expert parameters in the order in which models register them."""
_WITHOUT_ATTRIBUTE = frozenset({"llama4", "llama4_text"})
"""Transposed experts that do not say so: PEFT takes them for (experts, out, in)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    """The parameter that an update may be of, and the stack that holds it."""

    parameter: str
    stack: Stack
    is_transposed: bool | None
    """Whether the stored matrix is the transpose of up·down; None when shapes do not tell."""


@dataclass(frozen=True, slots=True)
class _Misfit:
    """Why an update has no place."""

    code: str
    target: str
    message: str


def place_experts(
    adapter: Adapter, updates: Sequence[ModuleUpdate], base: Base, choice: Choice, findings: Findings
) -> Iterator[tuple[ModuleUpdate, Part]]:
    """Turn every update of a stack into one low-rank update for each expert, laid out as stored."""
    by_module: dict[str, list[ModuleUpdate]] = {}
    for module_update in updates:
        by_module.setdefault(module_update.target, []).append(module_update)
    for module, group in by_module.items():
        for module_update in group:
            found = _find(module, module_update, len(group), adapter, base)
            if isinstance(found, _Candidate):
                yield from _one_by_one(module_update, found)
            elif choice.takes(found.target, module_update.keys):
                findings.error(found.code, found.target, found.message, module_update.keys)


def _find(
    module: str, module_update: ModuleUpdate, n_updates: int, adapter: Adapter, base: Base
) -> _Candidate | _Misfit:
    """Find the one parameter that an update is of, and its layout."""
    experts = module_update.update
    assert isinstance(experts, Experts)  # noqa: S101 - sorted by the caller
    candidates = [c for name in experts.scales if (c := _candidate(module, name, experts, base)) is not None]
    named = _by_nesting(experts, n_updates)
    if named is not None:
        candidates = [candidate for candidate in candidates if candidate.parameter == named]
    target = f"{module}.{named or next(iter(experts.scales), '?')}"
    if not candidates:
        return _no_candidate(module, target, experts, base)
    if len(candidates) > 1:
        names = " or ".join(candidate.parameter for candidate in candidates)
        return _Misfit("ambiguous-target", target, f"the update may be of {names}")
    (candidate,) = candidates
    is_transposed = candidate.is_transposed
    if is_transposed is None:
        is_transposed = _trained_transposed(adapter, base, candidate.stack)
    if is_transposed is None:
        shape = candidate.stack.shape[1:]
        message = f"experts are square {shape}: model type and peft_version do not say which axis is in"
        return _Misfit("ambiguous-layout", target, message)
    return replace(candidate, is_transposed=is_transposed)


def _no_candidate(module: str, target: str, experts: Experts, base: Base) -> _Misfit:
    stacks = {name: base.index.stack(f"{module}.{name}") for name in experts.scales}
    have = ", ".join(f"{name} {stack.shape}" for name, stack in stacks.items() if stack is not None)
    if have:
        shape = (int(experts.up.shape[0]), int(experts.down.shape[1]))
        n_rows = int(experts.down.shape[0])
        message = f"update is {shape} for each expert, with {n_rows} ranks of all experts; base is {have}"
        return _Misfit("shape-mismatch", target, message)
    if (inner := name_in_language_model(module, base, is_stack=True)) is not None:
        return _Misfit("text-model-target", target, f"not in base; its language model has {inner}")
    nearest = base.index.parameters_of(module)
    rest = f"; the module holds {', '.join(nearest)}" if nearest else ""
    return _Misfit("target-missing", target, f"no parameter {' or '.join(experts.scales)} in base{rest}")


def _by_nesting(experts: Experts, n_updates: int) -> str | None:
    """Name the parameter by its depth where all are known and all are there."""
    if len(experts.scales) != n_updates or not set(experts.scales) <= set(_REGISTRATION):
        return None
    innermost_first = sorted(experts.scales, key=_REGISTRATION.index)
    return innermost_first[n_updates - 1 - experts.nesting] if experts.nesting < n_updates else None


def _candidate(module: str, name: str, experts: Experts, base: Base) -> _Candidate | None:
    stack = base.index.stack(f"{module}.{name}")
    if stack is None:
        return None
    n_experts, n_rows, n_cols = stack.shape
    n_ranks = experts.ranks[name] * n_experts
    if (experts.down.shape[0], experts.up.shape[1]) != (n_ranks, n_ranks):
        return None
    shape = (experts.up.shape[0], experts.down.shape[1])
    if shape == (n_rows, n_cols):
        is_square_stack = n_rows == n_cols and (n_experts > 1 or not _is_matrix(stack, base))
        return _Candidate(parameter=name, stack=stack, is_transposed=None if is_square_stack else False)
    if shape == (n_cols, n_rows):
        return _Candidate(parameter=name, stack=stack, is_transposed=True)
    return None


def _is_matrix(stack: Stack, base: Base) -> bool:
    return len(base.specs[stack.experts[0][0].tensor].shape) == 2 and stack.is_fused


def _trained_transposed(adapter: Adapter, base: Base, stack: Stack) -> bool | None:
    """Say whether up·down is the transpose of the parameter in memory; None when that cannot be known."""
    types = frozenset(base.model_types)
    if not types or (stack.is_fused and types & TRANSPOSED_ON_DISK):
        return None
    says_transposed = bool(types & (TRANSPOSED_EXPERTS - _WITHOUT_ATTRIBUTE))
    version = _version(adapter)
    if version < (0, 19, 0):
        return True
    return not says_transposed if version == (0, 19, 0) else says_transposed


def _version(adapter: Adapter) -> tuple[int, ...]:
    """Read the release that trained the adapter; before 0.18 none was written."""
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", str(adapter.config.get("peft_version") or ""))
    return tuple(int(part or 0) for part in found.groups()) if found else (0,)


def _one_by_one(module_update: ModuleUpdate, candidate: _Candidate) -> Iterator[tuple[ModuleUpdate, Part]]:
    experts = module_update.update
    assert isinstance(experts, Experts)  # noqa: S101 - sorted by the caller
    for e, parts in enumerate(candidate.stack.experts):
        update: LowRank = experts.expert(candidate.parameter, e)
        if candidate.is_transposed:
            update = update.transposed()
        for part in parts:
            own = update if part.rows is None else update.rows(part.rows)
            yield (
                replace(module_update, update=own, orientation=Orientation.STORED),
                Part(tensor=part.tensor, region=part.region),
            )
