"""Modules that one dialect keeps whole and the other as several, row below row; or as one under another name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate

from lora_deploy.names.parts import Part, rows_of
from lora_deploy.tensors import TensorSpec

_NUMBER = "{i}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fused:
    """One module of the original release, and the modules of diffusers that its rows are."""

    original: str
    """Path with ``{i}`` for the block's number."""
    diffusers: tuple[str, ...]
    """Paths with ``{i}``, in the order of rows."""
    has_tail: bool = False
    """Whether all but the last are as high as the layer is wide, and the last has the rest; else all are equal."""
    swaps_halves: bool = False
    """Whether its two halves, shift and scale, come in the other order; only where it has no more than these two."""
    slots: tuple[str, str] = ("", "")
    """What the tensor itself is called in either dialect where that differs: ``scale`` and ``weight``."""


def other_names(
    specs: Mapping[str, TensorSpec], table: Iterable[Fused], *, is_original: bool
) -> Iterator[tuple[str, tuple[Part, ...]]]:
    """Yield the names of the dialect that the model is not stored in."""
    for fused in table:
        yield from _of_original(specs, fused) if is_original else _of_diffusers(specs, fused)


def _of_original(specs: Mapping[str, TensorSpec], fused: Fused) -> Iterator[tuple[str, tuple[Part, ...]]]:
    for i, slot, name in _found(specs, fused.original):
        region = specs[name].region
        if len(fused.diffusers) == 1:
            other = f"{_numbered(fused.diffusers[0], i)}.{_slot(slot, fused.slots)}"
            yield other, _whole(specs, name, slot, fused)
            continue
        heights = _heights(fused, specs[_sibling(name, slot)], region.n_rows)
        if heights is None:
            continue
        for path, start, stop in _runs(fused.diffusers, heights):
            yield f"{_numbered(path, i)}.{slot}", (Part(tensor=name, region=rows_of(region, start, stop)),)


def _of_diffusers(specs: Mapping[str, TensorSpec], fused: Fused) -> Iterator[tuple[str, tuple[Part, ...]]]:
    for i, slot, first in _found(specs, fused.diffusers[0]):
        other = f"{_numbered(fused.original, i)}.{_slot(slot, fused.slots[::-1])}"
        if len(fused.diffusers) == 1:
            yield other, _whole(specs, first, slot, fused)
            continue
        names = [f"{_numbered(path, i)}.{slot}" for path in fused.diffusers]
        if all(name in specs for name in names):
            runs = _runs(names, [specs[name].region.n_rows for name in names])
            yield other, tuple(Part(tensor=name, rows=slice(start, stop)) for name, start, stop in runs)


def _found(specs: Mapping[str, TensorSpec], path: str) -> Iterator[tuple[str, str, str]]:
    """Yield number, slot and name of the tensors in modules of this path."""
    pattern = re.compile(
        rf"{re.escape(path).replace(re.escape(_NUMBER), r'(?P<i>[0-9]+)')}\.(?P<slot>weight|bias|scale)"
    )
    for name in specs:
        if match := pattern.fullmatch(name):
            yield match.groupdict().get("i") or "", match["slot"], name


def _heights(fused: Fused, weight: TensorSpec, n_rows: int) -> list[int] | None:
    n_parts = len(fused.diffusers)
    if not fused.has_tail:
        return [n_rows // n_parts] * n_parts if n_rows % n_parts == 0 else None
    width = weight.region.n_cols
    tail = n_rows - width * (n_parts - 1)
    return [*[width] * (n_parts - 1), tail] if tail > 0 else None


def _whole(specs: Mapping[str, TensorSpec], name: str, slot: str, fused: Fused) -> tuple[Part, ...]:
    region, width = specs[name].region, specs[_sibling(name, slot)].region.n_cols if fused.swaps_halves else 0
    n_rows, half = region.n_rows, region.n_rows // 2
    if not fused.swaps_halves or n_rows != 2 * width:
        return (Part(tensor=name),)
    first, second = rows_of(region, 0, half), rows_of(region, half, n_rows)
    return (
        Part(tensor=name, region=second, rows=slice(0, half)),
        Part(tensor=name, region=first, rows=slice(half, n_rows)),
    )


def _runs(names: Iterable[str], heights: list[int]) -> list[tuple[str, int, int]]:
    stops = [*accumulate(heights)]
    return [(name, stop - height, stop) for name, height, stop in zip(names, heights, stops, strict=True)]


def _sibling(name: str, slot: str) -> str:
    """The weight beside a bias."""
    return f"{name.removesuffix(slot)}weight"


def _numbered(path: str, i: str) -> str:
    return path.replace(_NUMBER, i)


def _slot(slot: str, slots: tuple[str, str]) -> str:
    return slots[1] if slot == slots[0] else slot
