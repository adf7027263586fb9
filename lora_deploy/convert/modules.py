"""What an adapter changes, module by module: the form that other formats are written from.

Promise: factors are those that were read, in the layout that modules compute with, (out, in); what has no such form
(kinds that are no low-rank products, parts of tensors, names that only a base could settle) is refused, all at once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_deploy.adapter import Adapter, Experts, ModuleUpdate, Naming, Orientation, RowOrder
from lora_deploy.errors import RecipeError
from lora_deploy.names.dialects import prefixes_of
from lora_deploy.tensors import Region
from lora_deploy.updates.dora import Dora
from lora_deploy.updates.interface import Scale
from lora_deploy.updates.low_rank import LowRank
from lora_deploy.validate import Binding
from lora_deploy.validate.base import Base
from lora_deploy.validate.parts import Model, models_of

_EMBEDDING = re.compile(r"(?:^|\.)(embed_tokens|tok_embeddings|word_embeddings|embed_in|embeddings?|wte|wpe|shared)$")
_MAX_LISTED = 5


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Module:
    """One adapted module."""

    name: str
    """Its path in the model, or in its component."""
    component: str | None
    """Of a diffusion pipeline, such as ``unet``."""
    down: Tensor
    """(r, in, *kernel)."""
    up: Tensor
    """(out, r, *1)."""
    scale: Scale
    magnitude: Tensor | None
    """DoRA's, (out,)."""
    is_embedding: bool
    """Whether (in, out) are (tokens, dim)."""
    is_in_out: bool
    """Whether the base stores its weight as (in, out)."""


def modules_of(adapter: Adapter) -> tuple[Module, ...]:
    """Give the modules of an adapter by its own names.

    Raises:
        RecipeError: A kind that is no low-rank product, or a name, layout or order that only a base settles.
    """
    problems: dict[str, str] = {}
    modules = []
    if adapter.naming is not Naming.DOTTED:
        problems[adapter.name] = f"its names are {adapter.naming.value}: --base says which modules they mean"
    for entry in () if problems else adapter.updates:
        is_turned = entry.orientation is Orientation.STORED and _is_embedding(entry.target, ())
        reason = _needs_base(entry) or _no_product(entry.update, is_turned=is_turned)
        if reason:
            problems[entry.target] = reason
            continue
        modules.append(_module(entry.target, entry, kernel=(), is_in_out=False, component=None))
    _refuse(problems)
    return tuple(modules)


def modules_in_base(binding: Binding) -> tuple[Module, ...]:
    """Give the modules of a bound adapter by the base's names.

    Raises:
        RecipeError: A kind that is no low-rank product, or a change of a part of a tensor that is no run of its rows.
    """
    problems: dict[str, str] = {}
    modules: list[Module] = []
    checkpoint = binding.checkpoint
    parts = models_of(checkpoint) or {"": Model(checkpoint=checkpoint, prefix="")}
    bases = {name: Base(part.checkpoint) for name, part in parts.items()}
    for name, entries in binding.updates.items():
        component = next(part for part, model in parts.items() if name.startswith(model.prefix))
        inner, base = name.removeprefix(parts[component].prefix), bases[component]
        spec = base.spec(inner)
        is_turned = bool(base.stores_in_out(inner)) or _is_embedding(inner, spec.shape[2:] if spec else ())
        reasons = [reason for entry in entries if (reason := _no_product(entry.update, is_turned=is_turned))]
        if reasons or spec is None or not inner.endswith(".weight"):
            problems[name] = reasons[0] if reasons else "is no weight of a module of the base"
            continue
        whole = _in_one(entries, spec.region)
        if whole is None:
            problems[name] = "several changes of one tensor that are no runs of its rows under one scale"
            continue
        modules.append(
            _module(
                _prefix(base) + inner,
                whole,
                kernel=spec.shape[2:],
                is_in_out=bool(base.stores_in_out(inner)),
                component=component or None,
            )
        )
    _refuse(problems)
    return tuple(modules)


def _needs_base(entry: ModuleUpdate) -> str:
    if isinstance(entry.update, Experts):
        return "a stack of experts: --base says which parameter it is"
    if entry.alternatives:
        return "goes by several names: --base says which one the model has"
    if entry.row_order is not RowOrder.STORED:
        return "its rows are in rotary pairs: --base says of how many heads"
    is_stored = entry.orientation is Orientation.STORED and not _is_embedding(entry.target, ())
    if is_stored and isinstance(entry.update, LowRank | Dora):
        return "is laid out as a base stores it: --base says what layer it is"
    return ""


def _is_embedding(target: str, kernel: tuple[int, ...]) -> bool:
    return _EMBEDDING.search(target.removesuffix(".weight")) is not None and not kernel


def _no_product(update: object, *, is_turned: bool) -> str:
    """Say why an update has no place in other formats; ``is_turned`` says that it is laid out as (in, out)."""
    if isinstance(update, Dora) and isinstance(update.inner, LowRank):
        has_outputs = update.axis == ("columns" if is_turned else "rows")
        return "" if has_outputs else "its magnitudes are those of inputs, other formats have those of outputs"
    if isinstance(update, LowRank):
        return ""
    return f"a {getattr(update, 'kind', 'experts')} update is no low-rank product"


def _refuse(problems: dict[str, str]) -> None:
    if not problems:
        return
    shown = [f"  {target}: {reason}" for target, reason in list(problems.items())[:_MAX_LISTED]]
    rest = len(problems) - len(shown)
    lines = ["the adapter cannot be converted as it is:", *shown, *([f"  … and {rest} more"] if rest > 0 else [])]
    hint = (
        "give the base that it was trained on: --base BASE" if any("--base" in r for r in problems.values()) else None
    )
    raise RecipeError("\n".join(lines), hint=hint, code="not-convertible")


def _prefix(base: Base) -> str:
    """What the model puts before names of a base that was saved without a head."""
    known = prefixes_of(base.config)
    if not base.model_types or any(name.startswith(f"{prefix}.") for prefix in known for name in base.specs):
        return ""
    is_decoder = any(name.startswith(("layers.", "embed_tokens.")) for name in base.specs)
    return "model." if is_decoder and "model" in known else f"{known[0]}."


def _in_one(entries: Sequence[ModuleUpdate], whole: Region) -> ModuleUpdate | None:
    """Join changes of runs of rows into one of the whole tensor: B is zero elsewhere, and the ranks add up."""
    if len(entries) == 1 and entries[0].region in {None, whole}:
        return entries[0]
    scales = {(e.update.scale.factor, e.update.scale.root) for e in entries if isinstance(e.update, LowRank)}
    regions = [entry.region or whole for entry in entries]
    if len(scales) != 1 or any(region.n_cols != whole.n_cols or region.offset % whole.n_cols for region in regions):
        return None
    updates = [entry.update for entry in entries]
    if not all(isinstance(update, LowRank) for update in updates) or regions[-1].stop > whole.stop:
        return None
    factors = [update for update in updates if isinstance(update, LowRank)]
    up = torch.zeros(whole.n_rows, sum(factor.rank for factor in factors), dtype=factors[0].up.dtype)
    column = 0
    for factor, region in zip(factors, regions, strict=True):
        start = region.offset // whole.n_cols
        up[start : start + region.n_rows, column : column + factor.rank] = factor.up
        column += factor.rank
    joined = LowRank(down=torch.cat([factor.down for factor in factors]), up=up, scale=factors[0].scale)
    keys = tuple(dict.fromkeys(key for entry in entries for key in entry.keys))
    first = entries[0]
    return ModuleUpdate(target=first.target, update=joined, orientation=Orientation.STORED, keys=keys)


def _module(
    target: str, entry: ModuleUpdate, *, kernel: tuple[int, ...], is_in_out: bool, component: str | None
) -> Module:
    name = target.removesuffix(".weight")
    update = entry.update
    is_embedding = _is_embedding(name, kernel) and entry.orientation is Orientation.STORED
    if is_in_out or is_embedding:
        assert isinstance(update, LowRank | Dora)  # noqa: S101 - checked by the callers
        update = update.transposed()
    magnitude = None
    if isinstance(update, Dora):
        magnitude, update = update.magnitude, update.inner
    assert isinstance(update, LowRank)  # noqa: S101 - checked by the callers
    return Module(
        name=name,
        component=component,
        down=update.down.reshape(update.rank, -1, *kernel),
        up=update.up.reshape(*update.up.shape, *(1 for _ in kernel)),
        scale=update.scale,
        magnitude=magnitude,
        is_embedding=is_embedding,
        is_in_out=is_in_out,
    )


def padded(module: Module, rank: int) -> tuple[Tensor, Tensor]:
    """Give down and up with rows and columns of zeros up to a rank: the product is the same."""
    more = rank - module.down.shape[0]
    if not more:
        return module.down, module.up
    down = torch.cat([module.down, module.down.new_zeros(more, *module.down.shape[1:])])
    up = torch.cat([module.up, module.up.new_zeros(module.up.shape[0], more, *module.up.shape[2:])], dim=1)
    return down, up
