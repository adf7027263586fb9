"""The adapter beside the weights, on activations: x → Wx + s·B(Ax), for adapters that no peer's loader reads as merged.

Promise: weights are not touched, and no code of ``updates`` is called: of an update only its factors and its scale are
read. Kinds that are defined on weights (DoRA, residuals) have no such form here, and are not invented.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_deploy.evidence.architecture import Absence
from lora_deploy.evidence.chanced import DTypes, rounded_parameters
from lora_deploy.merge.plan import MergePlan, PlannedTensor
from lora_deploy.tensors import Region
from lora_deploy.updates.addition import Addition
from lora_deploy.updates.low_rank import LowRank
from lora_deploy.updates.replacement import Replacement
from lora_deploy.updates.token_rows import TokenRows

Rounded: TypeAlias = "Callable[[DTypes, torch.Generator], AbstractContextManager[None]]"
_WHOLE_KINDS = (LowRank, Addition, Replacement, TokenRows)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """One adapted parameter of the model, with its updates."""

    module: nn.Module
    attribute: str
    tensor: PlannedTensor

    @property
    def parameter(self) -> nn.Parameter:
        found: nn.Parameter = getattr(self.module, self.attribute)
        return found

    @property
    def updates(self) -> list[Any]:
        return [entry.update for entry in self.tensor.updates]


def why_not_beside(model: nn.Module, plan: MergePlan) -> Absence | None:
    """Say why some update has no form on activations; None where all have. The model needs no weights."""
    found = _find_places(model, plan)
    return found if isinstance(found, Absence) else None


@contextmanager
def beside(model: nn.Module, plan: MergePlan, *, within: str = "") -> Iterator[Rounded | Absence]:
    """Put the plan's updates on a loaded base; gives how to round it by chance, or why it cannot be done.

    ``within`` names a part of the model: the others have no weights, and their updates are left out.
    """
    places = _find_places(model, plan)
    if isinstance(places, Absence):
        yield places
        return
    part = model.get_submodule(within)
    inside = set(part.modules())
    places = [place for place in places if place.module in inside]
    terms_beside: list[_Beside] = []
    with ExitStack() as stack, torch.no_grad():
        for place in places:
            _assign(place)
            terms = [update for update in place.updates if isinstance(update, LowRank | Addition)]
            if terms:
                terms_beside.append(_Beside(terms))
                stack.callback(place.module.register_forward_hook(terms_beside[-1]).remove)
        yield lambda dtypes, generator: _merged_by_chance(part, places, terms_beside, dtypes, generator, within)


def _find_places(model: nn.Module, plan: MergePlan) -> list[_Place] | Absence:
    owners = {
        f"{path}.{name}" if path else name: (module, name)
        for path, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
    }
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found = []
    for tensor in plan.tensors:
        if not tensor.updates:
            continue
        name = tensor.spec.name
        owner = owners.get(name) or owners.get(prefix + name) or owners.get(name.removeprefix(prefix))
        if owner is None:
            return _absence(f"{name} has another name in the loaded model")
        reason = _unsupported(tensor, *owner)
        if reason:
            return _absence(f"{name}: {reason}")
        found.append(_Place(module=owner[0], attribute=owner[1], tensor=tensor))
        others = [
            (module, attribute)
            for module, attribute in owners.values()
            if module is not owner[0] and getattr(module, attribute) is getattr(*owner)
        ]
        if not plan.config.get("tie_word_embeddings", True):
            continue
        found += [_Place(module=module, attribute=attribute, tensor=tensor) for module, attribute in others]
    return found


def _absence(problem: str) -> Absence:
    return Absence(reason=f"no peer reads this adapter as it was merged, and {problem}", is_applicable=True)


def _unsupported(tensor: PlannedTensor, module: nn.Module, attribute: str) -> str:
    whole = Region.whole(tensor.spec.shape)
    for entry in tensor.updates:
        update = entry.update
        if not isinstance(update, _WHOLE_KINDS):
            return f"a change of kind {getattr(update, 'kind', 'experts')} is defined on weights, not on activations"
        if entry.region not in {None, whole}:
            return "only a part of it is adapted"
        if isinstance(update, LowRank) and attribute != "weight":
            return "is no weight of a layer"
        if isinstance(update, Addition) and attribute != "bias":
            return "a dense difference is defined on weights"
    if any(isinstance(entry.update, LowRank) for entry in tensor.updates):
        is_plain_convolution = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups == 1
        if not (isinstance(module, nn.Linear | nn.Embedding) or is_plain_convolution or _is_conv1d(module)):
            return f"layers of type {type(module).__name__} have no low-rank form here"
    return ""


def _is_conv1d(module: nn.Module) -> bool:
    """Whether a layer is transformers' own ``Conv1D``, which is linear and stores (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _assign(place: _Place) -> None:
    """Put the adapter's own values in place: those are no arithmetic."""
    for update in place.updates:
        if isinstance(update, Replacement):
            value = update.values.to(torch.float32).reshape(place.tensor.spec.shape)
            setattr(place.module, place.attribute, nn.Parameter(value, requires_grad=False))
        elif isinstance(update, TokenRows):
            value = place.parameter.detach().clone()
            value[list(update.indices)] = update.values.to(value.dtype)
            setattr(place.module, place.attribute, nn.Parameter(value, requires_grad=False))


class _Beside:
    """Adds what the updates of one parameter give to a layer's output."""

    def __init__(self, terms: list[LowRank | Addition]) -> None:
        self.is_on = True
        self.terms = [
            (term.up.float(), term.down.float(), term.scale.value)
            if isinstance(term, LowRank)
            else (term.values.float(), None, term.scale.value)
            for term in terms
        ]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if not self.is_on:
            return output
        for up, down, scale in self.terms:
            output = output + scale * (up.reshape(-1) if down is None else _term(module, args[0], up, down))
        return output


def _term(module: Any, x: Tensor, up: Tensor, down: Tensor) -> Tensor:  # noqa: ANN401 - layers of four kinds
    """B(Ax), factors in the layout of the stored weight: up (n_rows, r), down (r, n_cols)."""
    if isinstance(module, nn.Embedding):
        return functional.embedding(x, up) @ down
    if _is_conv1d(module):
        return (x @ up) @ down
    if isinstance(module, nn.Linear):
        return (x @ down.T) @ up.T
    kernel = module.weight.shape[2:]
    convolve: Any = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}[len(kernel)]
    inner = down.reshape(down.shape[0], -1, *kernel)
    outer = up.reshape(*up.shape, *([1] * len(kernel)))
    found: Tensor = convolve(
        convolve(x, inner, stride=module.stride, padding=module.padding, dilation=module.dilation),
        outer,
    )
    return found


@contextmanager
def _merged_by_chance(
    model: nn.Module,
    places: list[_Place],
    hooks: list[_Beside],
    dtypes: DTypes,
    generator: torch.Generator,
    within: str,
) -> Iterator[None]:
    """Add the products to the weights in float64, round by chance, and leave the hooks without effect meanwhile."""
    saved = [(place.module, place.attribute, place.parameter) for place in places]
    skip: set[int] = set()
    try:
        for place in places:
            value = place.parameter.detach().to(torch.float64)
            for update in place.updates:
                if isinstance(update, LowRank):
                    product = update.up.double() @ update.down.double()
                    value = value + update.scale.value * product.view(value.shape)
                elif isinstance(update, Addition):
                    value = value + update.scale.value * update.values.double().view(value.shape)
            rounded = dtypes.round(place.tensor.spec.name, value, generator)
            setattr(place.module, place.attribute, nn.Parameter(rounded, requires_grad=False))
            skip.add(id(place.parameter))
        for hook in hooks:
            hook.is_on = False
        with rounded_parameters(
            model, dtypes, generator, skip=skip, name_of=lambda name: f"{within}.{name}".strip(".")
        ):
            yield
    finally:
        for hook in hooks:
            hook.is_on = True
        for module, attribute, parameter in saved:
            setattr(module, attribute, parameter)
