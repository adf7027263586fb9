"""The unmerged model: the base with its adapter beside it, in float32. What every merge and graph is compared with.

Independence: where PEFT reads the adapter's file, PEFT's own loader builds this model, from the file whose sha256 is
the one that was merged; nothing of ``updates`` is called. Elsewhere (several adapters, weights, patterns, options of
reading, other formats) our reader's factors act on activations, x → s·B(Ax), and the result says that it shares our
reader: a wrong scale would be on both sides. This is the only module that imports PEFT, and no bytes come from it.

Promise: the base's outputs, the unmerged ones, and those of weights rounded by chance come from one loaded model, one
after the other; it is as it was after each.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_deploy.adapter import Adapter
from lora_deploy.adapters.interface import ReadOptions
from lora_deploy.adapters.open import CONFIG_NAME
from lora_deploy.artifact import sha256_of
from lora_deploy.errors import InputError
from lora_deploy.evidence.activation import Rounded, beside, why_not_beside
from lora_deploy.evidence.architecture import INSTALL_HINT, Absence, missing_packages
from lora_deploy.evidence.chanced import DTypes, rounded_parameters
from lora_deploy.evidence.forward import quiet_peers
from lora_deploy.merge.plan import MergePlan
from lora_deploy.updates.interface import Update
from lora_deploy.updates.joint import Joint
from lora_deploy.validate import BindOptions

_PEFT_NAMES = ("adapter_model.safetensors", "adapter_model.bin")
_SHARED = "the factors that were read, on activations: shares our reader"
_INSIDE = (".base_model.model.", ".base_layer", ".original_module", ".modules_to_save.default", ".token_adapter")
"""What PEFT puts into the names of modules."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unmerged:
    """A model with its adapter beside its weights, ready to run."""

    model: nn.Module
    source: str
    """Who put the adapter there."""
    is_independent: bool
    """Whether nothing of our reader took part."""
    modules: Mapping[str, nn.Module]
    """Modules that the merged model has, too, by their names there."""
    rounded: Rounded
    """Within this, the adapter is merged and every weight rounded by chance to the dtype it is stored in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnmergedParts:
    """A model without weights, with its adapter beside them, whose parts can be run once they are given theirs."""

    model: nn.Module
    source: str
    is_independent: bool
    modules: Mapping[str, nn.Module]
    """As of ``Unmerged``."""
    base_name: Callable[[str], str]
    """What a parameter of the model is called in the base; empty for those that only the adapter has."""
    part: Callable[[str], AbstractContextManager[Rounded | Absence]]
    """Within this, the part of that name, which has its weights, has its adapter; gives how to round it by chance."""


def peer_reads(plan: MergePlan) -> bool:
    """Whether PEFT, given the adapter's folder, loads what was merged."""
    adapters = plan.binding.adapters
    if len(adapters) != 1 or adapters[0].format != "peft" or adapters[0].config_sha256 is None:
        return False
    options = plan.read_options
    in_own_folder = adapters[0].path.parent.name == options.adapter_name
    plain = ReadOptions(adapter_name=options.adapter_name if in_own_folder else None)
    bound = plan.binding.options
    return options == plain and bound == BindOptions(tokenizer=bound.tokenizer)


@contextmanager
def unmerged(model: nn.Module, plan: MergePlan) -> Iterator[Unmerged | Absence]:
    """Put the plan's adapters beside a loaded base; the model is used up.

    Raises:
        InputError: The adapter's file is not the one that was merged.
    """
    for adapter in plan.binding.adapters:
        _check_unchanged(adapter)
    if peer_reads(plan):
        missing = missing_packages("peft")
        if missing:
            yield Absence(
                reason="peft is not installed: the unmerged model cannot be run", is_applicable=True, hint=INSTALL_HINT
            )
            return
        yield _with_peft(model, plan.binding.adapters[0])
        return
    with beside(model, plan) as found:
        if isinstance(found, Absence):
            yield found
            return
        yield Unmerged(
            model=model,
            source=_SHARED,
            is_independent=False,
            modules=dict(model.named_modules()),
            rounded=found,
        )


def unmerged_parts(model: nn.Module, plan: MergePlan) -> UnmergedParts | Absence:
    """Put the plan's adapters beside the weights that a base on the meta device will have; the model is used up.

    Raises:
        InputError: The adapter's file is not the one that was merged.
    """
    for adapter in plan.binding.adapters:
        _check_unchanged(adapter)
    if not peer_reads(plan):
        problem = why_not_beside(model, plan)
        return problem or UnmergedParts(
            model=model,
            source=_SHARED,
            is_independent=False,
            modules=dict(model.named_modules()),
            base_name=str,
            part=lambda name: beside(model, plan, within=name),
        )
    if missing_packages("peft"):
        return Absence(
            reason="peft is not installed: no part can be run unmerged", is_applicable=True, hint=INSTALL_HINT
        )
    updates = [entry.update for t in plan.tensors for entry in t.updates if isinstance(entry.update, Update)]
    if any(update.needs_whole or isinstance(update, Joint) for update in updates):
        reason = "peft takes this kind of adapter out of the weights when it loads, and needs all of them for that"
        return Absence(reason=reason, is_applicable=True)
    with _seeming_loaded(model):
        found = _with_peft(model, plan.binding.adapters[0], low_cpu_mem_usage=True)
    if isinstance(found, Absence):
        return found

    def part(name: str) -> AbstractContextManager[Rounded]:
        module = found.model.get_submodule(name)
        return nullcontext(lambda dtypes, generator: _merged_by_chance(module, dtypes, generator, within=name))

    return UnmergedParts(
        model=found.model,
        source=found.source,
        is_independent=True,
        modules=found.modules,
        base_name=lambda name: "" if "modules_to_save" in name.split(".") else plain_name(name),
        part=part,
    )


@contextmanager
def _seeming_loaded(model: nn.Module) -> Iterator[None]:
    """Have parameters of the meta device on the CPU, one number each: PEFT puts an adapter where its base is."""
    empty: dict[nn.Parameter, nn.Parameter] = {}
    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            seeming = nn.Parameter(parameter.new_zeros((), device="cpu").expand(parameter.shape), requires_grad=False)
            empty[seeming] = parameter
            setattr(module, name, seeming)
    try:
        yield
    finally:
        for module in list(model.modules()):
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter in empty:
                    setattr(module, name, empty[parameter])


def _check_unchanged(adapter: Adapter) -> None:
    expected = {adapter.path: adapter.sha256}
    if adapter.config_sha256 is not None:
        expected[adapter.path.parent / adapter.config_name] = adapter.config_sha256
    for path, sha256 in expected.items():
        found = sha256_of(path)
        if found != sha256:
            raise InputError(
                f"{path}: sha256 {found[:12]}…, merged was {sha256[:12]}…: not the adapter that was merged",
                code="input-changed",
            )


def _with_peft(model: nn.Module, adapter: Adapter, **settings: Any) -> Unmerged | Absence:  # noqa: ANN401 - PEFT's own
    with quiet_peers():
        import peft

    with _peft_folder(adapter) as folder, warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            wrapped = peft.PeftModel.from_pretrained(
                model, str(folder), is_trainable=False, local_files_only=True, **settings
            )
        except Exception as error:  # noqa: BLE001 - whatever the peer raises, it does not read this adapter
            reason = f"peft {peft.__version__} does not load {adapter.path}: {type(error).__name__}: {error}"
            return Absence(reason=reason, is_applicable=True)
    lost = [str(item.message) for item in heard if "missing adapter keys" in str(item.message)]
    if lost:
        return Absence(
            reason=f"peft {peft.__version__} does not load all of the adapter: {lost[0]}", is_applicable=True
        )
    inner: nn.Module = wrapped.get_base_model().float().eval()
    return Unmerged(
        model=inner,
        source=f"peft {peft.__version__}, unmerged",
        is_independent=True,
        modules=_modules_of_the_merged(inner),
        rounded=lambda dtypes, generator: _merged_by_chance(inner, dtypes, generator),
    )


@contextmanager
def _peft_folder(adapter: Adapter) -> Iterator[Path]:
    """Give a folder with the names that PEFT looks for."""
    if adapter.path.name in _PEFT_NAMES:
        yield adapter.path.parent
        return
    with tempfile.TemporaryDirectory(prefix="lora-deploy-") as made:
        folder = Path(made)
        (folder / CONFIG_NAME).symlink_to((adapter.path.parent / CONFIG_NAME).resolve())
        name = _PEFT_NAMES[0 if adapter.path.suffix == ".safetensors" else 1]
        (folder / name).symlink_to(adapter.path.resolve())
        yield folder


def plain_name(name: str) -> str:
    """Name a module or parameter as the merged model does."""
    name = f".{name}"
    for part in _INSIDE:
        name = name.replace(part, "." if part.endswith(".") else "")
    return name.removeprefix(".")


def _modules_of_the_merged(model: nn.Module) -> dict[str, nn.Module]:
    """Leave out what only the unmerged model has: factors, and bases whose output lacks the adapter's part."""
    return {
        plain_name(name): module
        for name, module in model.named_modules()
        if not any(part.startswith("lora_") or part in {"base_layer", "original_module"} for part in name.split("."))
    }


@contextmanager
def _merged_by_chance(
    model: nn.Module, dtypes: DTypes, generator: torch.Generator, *, within: str = ""
) -> Iterator[None]:
    """Merge with PEFT's own code, layer by layer, finer than what is stored; then round every parameter by chance.

    ``within`` is the path of the module in the whole model.
    """

    def full_name(name: str) -> str:
        return plain_name(f"{within}.{name}".strip("."))

    outer = list(_outer_layers(model))
    saved: list[tuple[nn.Module, str, nn.Parameter]] = []
    merged: list[Any] = []
    rounded: set[int] = set()
    names = {id(module): name for name, module in model.named_modules()}
    try:
        for layer in outer:
            parts = [
                (module, name, parameter)
                for module in layer.get_base_layer().modules()
                for name, parameter in module.named_parameters(recurse=False)
            ]
            saved += parts
            for module, name, parameter in parts:
                own = parameter.detach().to(dtypes.working, copy=True)
                setattr(module, name, nn.Parameter(own, requires_grad=False))
            layer.to(dtypes.working)
            for inner in reversed(list(_layers(layer))):
                merged.append(inner)
                with torch.no_grad(), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    inner.merge()
            for module, name, _ in parts:
                full = full_name(f"{names[id(module)]}.{name}")
                value = dtypes.round(full, getattr(module, name).detach(), generator)
                setattr(module, name, nn.Parameter(value, requires_grad=False))
                rounded.add(id(getattr(module, name)))
            layer.float()
            rounded |= {id(p) for _, p in layer.named_parameters()}
        with rounded_parameters(model, dtypes, generator, skip=rounded, name_of=full_name):
            yield
    finally:
        for module, name, parameter in saved:
            setattr(module, name, parameter)
        for layer in merged:
            layer.merged_adapters.clear()
        model.float()


def _layers(module: nn.Module) -> Iterator[Any]:
    """Every adapted layer in a module, outer before inner."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return (found for found in module.modules() if isinstance(found, BaseTunerLayer))


def _outer_layers(model: nn.Module) -> Sequence[Any]:
    """Adapted layers that are in no other one."""
    inside = {id(inner) for layer in _layers(model) for inner in _layers(layer) if inner is not layer}
    return [layer for layer in _layers(model) if id(layer) not in inside]
