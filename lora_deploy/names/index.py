"""Look a name up among the tensors of a checkpoint: whole tensors, parts of fused ones, stacks of separate ones."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import Any

from lora_deploy.names.dialects import (
    SPLITS,
    TRANSPOSED_EXPERTS,
    TRANSPOSED_ON_DISK,
    canonical_form,
    model_types,
)
from lora_deploy.names.diffusion import other_names
from lora_deploy.names.parts import Part, rows_of
from lora_deploy.tensors import Region, TensorSpec

_ONE_EXPERT = re.compile(
    r"^(?P<module>.*\.experts)\.(?P<e>\d+)\.(?P<projection>w[123]|gate_proj|up_proj|down_proj)\.weight$"
)
_FUSED_EXPERTS = re.compile(r"^(?P<module>.*\.experts)\.(?P<parameter>gate_up_proj|down_proj)$")
_GATE, _UP, _DOWN = ("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")
_TWINS = {one: other for pair in (_GATE, _UP, _DOWN) for one, other in (pair, pair[::-1])}
"""A projection of an expert by its two names: Mixtral's, and everybody else's."""
_MAX_CANDIDATES = 3000
_TEXT_MODEL = "text_model_"
"""What old text encoders have around their layers, and some savers leave out."""


class AmbiguousNameError(LookupError):
    """A name fits more than one tensor; never leaves ``validate``, which makes a finding of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """One parameter of a stack of experts, wherever its experts are stored."""

    shape: tuple[int, int, int]
    """Experts, and the two axes of each as stored (fused files) or as computed, (out, in)."""
    experts: tuple[tuple[Part, ...], ...]
    """By expert; ``rows`` count from the expert's first."""
    is_fused: bool
    """Whether the file holds the stack as one tensor."""


class NameIndex:
    """Finds the tensors that a name of any dialect means."""

    def __init__(self, specs: Mapping[str, TensorSpec], config: Mapping[str, Any]) -> None:
        """Index the tensors by canonical name; ``specs`` may rename or repeat those of a checkpoint."""
        self._specs = specs
        self._types = frozenset(model_types(config))
        self.canonical = canonical_form(config)
        self._stored: dict[str, list[str]] = {}
        for name in specs:
            self._stored.setdefault(self.canonical(name), []).append(name)
        self._stacks = dict(self._fused_stacks()) | dict(self._separate_stacks())
        self._parts = dict(self._derived_parts())
        self._nearest: dict[str, tuple[str, ...]] = {}

    def find(self, name: str) -> tuple[Part, ...] | None:
        """Find where the rows of an update of this name go; None when the base has no such tensor.

        Raises:
            AmbiguousNameError: More than one tensor has this name in some dialect.
        """
        if name in self._specs:
            return (Part(tensor=name),)
        canonical = self.canonical(name)
        stored = self._stored.get(canonical, [])
        if len(stored) > 1:
            raise AmbiguousNameError(f"fits {' and '.join(stored)}")
        if stored:
            return (Part(tensor=stored[0]),)
        return self._parts.get(canonical)

    def unflattened(self, module: str) -> tuple[str, ...]:
        """Give the paths of modules that are this one when their dots are underscores: one in each dialect."""
        flattened = self._flattened
        return flattened.get(module) or flattened.get(module.removeprefix(_TEXT_MODEL), ())

    def nearest_flattened(self, module: str) -> tuple[str, ...]:
        """Give up to three modules that this one may have been meant to be."""
        return tuple(get_close_matches(module, [*self._flattened][:_MAX_CANDIDATES], n=3, cutoff=0.6))

    @cached_property
    def _flattened(self) -> dict[str, tuple[str, ...]]:
        paths = dict.fromkeys(name.rpartition(".")[0] for name in (*self._specs, *self._stored, *self._parts))
        found: dict[str, tuple[str, ...]] = {}
        for path in paths:
            flat = path.replace(".", "_")
            found[flat] = (*found.get(flat, ()), path)
        return found

    def stack(self, name: str) -> Stack | None:
        """Find a parameter that holds one matrix for each expert (or a single matrix), by the name it has in memory."""
        found = self.find(name)
        if found is None or found[0].region is not None or found[0].rows is not None:
            return self._stacks.get(self.canonical(name))
        spec = self._specs[found[0].tensor]
        if len(spec.shape) == 2:
            n_rows, n_cols = spec.shape
            return Stack(shape=(1, n_rows, n_cols), experts=(found,), is_fused=True)
        return self._stacks.get(self.canonical(spec.name)) or _fused_stack(spec)

    def parameters_of(self, module: str) -> tuple[str, ...]:
        """Names of the parameters that lie directly in a module of this name."""
        prefix = self.canonical(f"{module}.")
        names = {*self._stored, *self._stacks}
        return tuple(sorted(n[len(prefix) :] for n in names if n.startswith(prefix) and "." not in n[len(prefix) :]))

    def nearest(self, name: str) -> tuple[str, ...]:
        """Give up to three stored names that this one may have been meant to be."""
        canonical = self.canonical(name)
        general = re.sub(r"\.\d+\.", ".#.", canonical)
        if general not in self._nearest:
            self._nearest[general] = tuple(self._closest(canonical))
        return self._nearest[general]

    def _closest(self, canonical: str) -> Iterator[str]:
        parents = canonical.split(".")
        for depth in range(len(parents) - 1, -1, -1):
            ancestor = ".".join(parents[:depth])
            prefix = f"{ancestor}." if ancestor else ""
            below = [name for name in self._stored if name.startswith(prefix)]
            if not below:
                continue
            one_of_each = {
                re.sub(r"\.\d+\.", ".#.", name[len(prefix) :]): name[len(prefix) :] for name in reversed(below)
            }
            names = [*one_of_each.values()][:_MAX_CANDIDATES]
            close = get_close_matches(canonical[len(prefix) :], names, n=3, cutoff=0.4)
            if close or not prefix:
                yield from (name.removesuffix(".weight") for name in close)
                return

    def _derived_parts(self) -> Iterator[tuple[str, tuple[Part, ...]]]:
        """Name what no tensor is called: rows of fused tensors, and fused names of separate tensors."""
        for name, parts in other_names(self._specs):
            yield self.canonical(name), parts
        for canonical, stored in self._stored.items():
            yield from self._row_parts(canonical, stored[0])
            if match := _ONE_EXPERT.match(canonical):
                twin = _TWINS[match["projection"]]
                yield f"{match['module']}.{match['e']}.{twin}.weight", (Part(tensor=stored[0]),)
        for canonical, stack in self._stacks.items():
            n_rows = stack.shape[1]
            if not stack.is_fused:
                shifted = (_shift(part, e * n_rows, n_rows) for e, parts in enumerate(stack.experts) for part in parts)
                yield canonical, tuple(shifted)
            elif match := _FUSED_EXPERTS.match(canonical):
                for e, (part,) in enumerate(stack.experts):
                    yield from _expert_names(match["module"], match["parameter"], e, part)

    def _row_parts(self, canonical: str, name: str) -> Iterator[tuple[str, tuple[Part, ...]]]:
        for whole, parts in (split for model_type in self._types for split in SPLITS.get(model_type, ())):
            module, _, slot = canonical.rpartition(".")
            stem = module.removesuffix(whole)
            if stem == module or not stem.endswith("."):
                continue
            region = self._specs[name].region
            if region.n_rows % len(parts):
                continue
            for k, part in enumerate(parts):
                yield f"{stem}{part}.{slot}", (Part(tensor=name, region=_rows_of(region, k, len(parts))),)

    def _fused_stacks(self) -> Iterator[tuple[str, Stack]]:
        for canonical, stored in self._stored.items():
            spec = self._specs[stored[0]]
            in_out = self._types & (TRANSPOSED_EXPERTS | TRANSPOSED_ON_DISK)
            if len(spec.shape) == 3 and _FUSED_EXPERTS.match(canonical) and not in_out:
                yield canonical, _fused_stack(spec)

    def _separate_stacks(self) -> Iterator[tuple[str, Stack]]:
        modules: dict[str, dict[int, dict[str, TensorSpec]]] = {}
        for canonical, stored in self._stored.items():
            if match := _ONE_EXPERT.match(canonical):
                expert = modules.setdefault(match["module"], {}).setdefault(int(match["e"]), {})
                expert[match["projection"]] = self._specs[stored[0]]
        for module, experts in modules.items():
            if sorted(experts) != list(range(len(experts))):
                continue
            gated = any(name in experts[0] for name in _GATE)
            first = ("gate_up_proj", (_GATE, _UP)) if gated else ("up_proj", (_UP,))
            for parameter, projections in (first, ("down_proj", (_DOWN,))):
                if (stack := _separate_stack(experts, projections)) is not None:
                    yield f"{module}.{parameter}", stack


def _fused_stack(spec: TensorSpec) -> Stack:
    n_experts, n_rows, n_cols = spec.shape
    regions = (Region(offset=e * n_rows * n_cols, n_rows=n_rows, n_cols=n_cols) for e in range(n_experts))
    return Stack(
        shape=(n_experts, n_rows, n_cols),
        experts=tuple((Part(tensor=spec.name, region=region),) for region in regions),
        is_fused=True,
    )


def _separate_stack(
    experts: Mapping[int, Mapping[str, TensorSpec]], projections: tuple[tuple[str, str], ...]
) -> Stack | None:
    rows_of_experts = []
    shapes = set()
    for e in range(len(experts)):
        specs = [experts[e].get(name) or experts[e].get(short) for name, short in projections]
        parts, start = [], 0
        for spec in specs:
            if spec is None or len(spec.shape) != 2:
                return None
            parts.append(Part(tensor=spec.name, rows=slice(start, start + spec.shape[0])))
            start += spec.shape[0]
            shapes.add(spec.shape)
        rows_of_experts.append(tuple(parts))
    if len(shapes) != 1:
        return None
    ((n_rows, n_cols),) = shapes
    shape = (len(experts), n_rows * len(projections), n_cols)
    return Stack(shape=shape, experts=tuple(rows_of_experts), is_fused=False)


def _shift(part: Part, start: int, n_rows: int) -> Part:
    rows = part.rows or slice(0, n_rows)
    return Part(tensor=part.tensor, region=part.region, rows=slice(rows.start + start, rows.stop + start))


def _rows_of(region: Region, k: int, n_parts: int) -> Region:
    n_rows = region.n_rows // n_parts
    return rows_of(region, k * n_rows, (k + 1) * n_rows)


def _expert_names(module: str, parameter: str, e: int, part: Part) -> Iterator[tuple[str, tuple[Part, ...]]]:
    groups = (_GATE, _UP) if parameter == "gate_up_proj" else (_DOWN,)
    if part.region is None or part.region.n_rows % len(groups):
        return
    for k, names in enumerate(groups):
        rows = (Part(tensor=part.tensor, region=_rows_of(part.region, k, len(groups))),)
        for name in names:
            yield f"{module}.{e}.{name}.weight", rows
