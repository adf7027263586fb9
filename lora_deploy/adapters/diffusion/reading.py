"""A file of a diffusion adapter: every key sorted to its module, every module's updates, and which parts are wanted.

Promise: every tensor of the file is in an update, or counted by a finding that says why not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from fractions import Fraction

from lora_deploy.adapter import Adapter, ModuleUpdate, Naming
from lora_deploy.adapters.adapted import Adapted
from lora_deploy.adapters.diffusion.algorithms import updates_of
from lora_deploy.adapters.diffusion.keys import Components, parse
from lora_deploy.adapters.findings import note, untrained
from lora_deploy.adapters.interface import AdapterFile, ReadOptions
from lora_deploy.errors import Finding, MalformedAdapterError, RecipeError, UnmergeableAdapterError
from lora_deploy.names.diffusion.flux import parts_of
from lora_deploy.updates.interface import Scale

ScaleOfModule = Callable[[Adapted, int], Scale]
_TRAINING = {
    "ss_network_module": "network",
    "ss_network_dim": "dim",
    "ss_network_alpha": "alpha",
    "ss_base_model_version": "base",
    "modelspec.architecture": "architecture",
}
"""Keys of the header, and what they are called."""
_T_LORA = frozenset({"q_layer", "p_layer", "lambda_layer"})


def read_modules(
    file: AdapterFile, options: ReadOptions, format_name: str, scale_of: ScaleOfModule | None = None
) -> Adapter:
    """Turn a file into an adapter; ``scale_of`` gives a module's scale for its rank, by default that of its alpha.

    Raises:
        MalformedAdapterError: A key that no trainer writes, or tensors that do not fit each other.
        UnmergeableAdapterError: An algorithm that no weights can express.
        RecipeError: A part that the file does not hold.
    """
    modules, is_flattened = _modules(file)
    chosen, findings = _chosen(file, modules, options.adapter_name)
    scale_of = scale_of or by_alpha(options)
    updates: list[ModuleUpdate] = []
    for module in chosen:
        updates += updates_of(module, lambda rank, module=module: scale_of(module, rank))  # type: ignore[misc]
    return Adapter(
        path=file.path,
        name=file.name,
        format=format_name,
        naming=Naming.FLATTENED if is_flattened else Naming.DOTTED,
        updates=tuple(updates),
        findings=(*findings, *untrained(updates)),
        sha256=file.sha256,
        trained_with=_training(file.metadata),
        config=dict(file.metadata),
        config_name=f"{file.path.name}'s header",
    )


def _training(metadata: Mapping[str, str]) -> str | None:
    """Say what sd-scripts and its kin write about training, each value on one line and not too long."""
    told = [(label, metadata[key]) for key, label in _TRAINING.items() if metadata.get(key, "None") != "None"]
    clean = (f"{label} {''.join(filter(str.isprintable, value))[:60]}" for label, value in told)
    return ", ".join(clean) or None


def by_alpha(options: ReadOptions) -> ScaleOfModule:
    """Give alpha / r of a module, where alpha is its own tensor; without one the scale is 1, as all loaders have it.

    Source: sd-scripts 0.9, ``networks/lora.py``; diffusers 0.42, ``loaders/lora_conversion_utils.py``.
    """

    def scale_of(module: Adapted, rank: int) -> Scale:
        alpha = module.number("alpha")
        if alpha:
            return _of(alpha, rank, f"alpha {float(alpha):g}")
        if options.alpha is not None:
            told = " (instead of 0)" if alpha is not None else ""
            return _of(Fraction(options.alpha), rank, f"--alpha {options.alpha:g}{told}")
        if alpha is not None:
            raise _zero(module, rank)
        return Scale(factor=Fraction(1), source="1: no alpha in the file, so it is the rank")

    return scale_of


def _zero(module: Adapted, rank: int) -> MalformedAdapterError:
    return MalformedAdapterError(
        f"{module.file.path}: {module.path}: alpha is 0: sd-scripts and LyCORIS take that for the rank, "
        "other loaders for no change at all",
        hint=f"say which: --alpha {rank} is scale 1",
        code="alpha-unknown",
    )


def _of(alpha: Fraction, rank: int, source: str) -> Scale:
    return Scale(factor=alpha / rank, source=f"{source} / r {rank}")


def _modules(file: AdapterFile) -> tuple[list[Adapted], bool]:
    """Sort every key to its module; whether any of them has underscores for dots."""
    tables: dict[tuple[Components, str], dict[str, str]] = {}
    is_flattened = False
    for name in file.tensors:
        key = parse(name)
        if key is None:
            raise _unknown(file, name)
        is_flattened |= key.is_flattened
        table = tables.setdefault((key.components, key.module), {})
        if key.slot in table:
            both = f"{table[key.slot]} and {name}"
            raise MalformedAdapterError(f"{file.path}: {both} are both {key.slot} of {key.module}")
        table[key.slot] = name
    modules = [
        Adapted(file=file, path=module, slots=slots, shared={}, components=components)
        for (components, module), slots in tables.items()
    ]
    return [part for module in modules for part in _parted(module)], is_flattened


def _parted(module: Adapted) -> Iterator[Adapted]:
    """Take sd-scripts' OFT of Flux apart, which turns the parts of fused layers one by one.

    Raises:
        MalformedAdapterError: It has blocks for other parts than the layer has.
    """
    blocks = {slot.rpartition(".")[2]: key for slot, key in module.slots.items() if slot.startswith("oft_blocks.")}
    if not blocks:
        yield module
        return
    parts = parts_of(module.path)
    rest = {slot: key for slot, key in module.slots.items() if not slot.startswith("oft_blocks.")}
    if sorted(blocks) != [str(k) for k in range(len(parts))] or not rest.keys() <= {"alpha"}:
        raise module.malformed(f"has {', '.join(module.slots)}, expected oft_blocks for each of {len(parts)} parts")
    for k, part in enumerate(parts):
        yield replace(module, path=part, slots={"oft_blocks": blocks[str(k)], **rest})


def _unknown(file: AdapterFile, key: str) -> MalformedAdapterError | UnmergeableAdapterError:
    if not _T_LORA.isdisjoint(key.split(".")):
        return UnmergeableAdapterError(f"{file.path}: {key}: T-LoRA masks ranks by the time step, as no weights can")
    return MalformedAdapterError(
        f"{file.path}: {key}: no tensor that sd-scripts, LyCORIS, diffusers or Flux trainers write"
    )


def _chosen(file: AdapterFile, modules: list[Adapted], name: str | None) -> tuple[Iterable[Adapted], list[Finding]]:
    """Take the modules of one component where the user names it; what is left is noted."""
    if name is None:
        return modules, []
    chosen = [module for module in modules if name in module.components]
    if not chosen:
        held = dict.fromkeys(module.components[0] for module in modules if module.components)
        raise RecipeError(f"{file.path}: nothing for a {name} in the file, it holds {', '.join(held) or 'no names'}")
    left = [key for module in modules if name not in module.components for key in module.slots.values()]
    notes = [note("unused-tensors", left[0], f"{len(left)} tensors are of other components")] if left else []
    return [replace(module, components=(name,)) for module in chosen], notes
