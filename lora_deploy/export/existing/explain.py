"""Say of every run of bytes which tensors it is made of, from how the graphs read it.

Promise: what is explained has one layout, told by every node that reads it, and a name. The rest is listed with the
reason, as far as it looks like a weight.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_deploy.errors import Finding, Severity
from lora_deploy.export.binding_table import Joined, Origin, Slot, Taken
from lora_deploy.export.existing.naming import Namer, packed_names, part_of, spell
from lora_deploy.export.existing.runs import Run
from lora_deploy.export.existing.uses import Layout, Use, uses_of
from lora_deploy.names.dialects import CONV1D_MODULES, CONV1D_TYPES, model_types

_QUANTISED = (
    *("MatMulNBits", "MatMulBnb4", "DequantizeLinear", "QLinear", "MatMulInteger", "GatherBlockQuantized"),
    *("QGemm", "QAttention", "DynamicQuantizeMatMul", "ConvInteger", "QMoE"),
)
_FUSED_TYPES = frozenset({"phi3"})
"""Model types whose own projection of queries, keys and values is one."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GraphFile:
    """A parsed graph and where its weights lie."""

    file: str
    model: Any
    runs: Mapping[str, Run]
    """Floating initializers that are runs of bytes."""


@dataclass(slots=True)
class _Reading:
    """Everything that is known of a run."""

    initializers: list[str] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)
    names: dict[str, None] = field(default_factory=dict)
    is_builders: bool = False
    """Whether onnxruntime-genai's builder named it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Explained:
    """A run that is explained."""

    slot: Slot
    aliases: tuple[str, ...] = ()
    """Every name of what the slot's only tensor is, where modules share it; the slot has the first."""


def explain(graphs: Sequence[GraphFile], config: Mapping[str, Any]) -> tuple[list[Explained], list[Finding]]:
    """Explain the runs of all graphs together: what they share is read by all of them."""
    readings: dict[Run, _Reading] = defaultdict(_Reading)
    findings: list[Finding] = []
    for graph in graphs:
        uses, names = uses_of(graph.model), [tensor.name for tensor in graph.model.graph.initializer]
        modules = [use.module for found in uses.values() for use in found if use.module]
        namer = Namer(names, part_of(graph.file, [*names, *modules], config))
        for name, run in graph.runs.items():
            reading = readings[run]
            reading.initializers.append(name)
            reading.uses += uses.get(name, ())
            reading.names |= namer.names(name, uses.get(name, ()))
            reading.is_builders |= namer.is_builders
        findings += _quantised(graph, uses)
    explained = []
    for run, reading in readings.items():
        origin = _origin(run, reading, config)
        if isinstance(origin, str):
            findings += _unexplained(run, reading, origin)
        else:
            slot = Slot(
                file=run.file,
                offset=run.offset,
                n_bytes=run.n_bytes,
                dtype=run.dtype.value,
                shape=run.shape,
                origin=origin,
            )
            aliases = tuple(reading.names) if isinstance(origin, Taken) else ()
            explained.append(Explained(slot=slot, aliases=aliases))
    return explained, findings


def _origin(run: Run, reading: _Reading, config: Mapping[str, Any]) -> Origin | str:
    """Where a run comes from, or why that is not known."""
    layouts = {use.layout for use in reading.uses}
    if Layout.UNKNOWN in layouts:
        operators = sorted({use.operator for use in reading.uses if use.layout is Layout.UNKNOWN})
        return f"read by {', '.join(operators)}, which does not tell its layout"
    if len(layouts) != 1:
        return "its readers disagree about its layout" if layouts else "no node reads it"
    if not reading.names:
        return "neither its name nor its readers tell what it is"
    name = next(iter(reading.names))
    is_turned = layouts == {Layout.TURNED}
    packed = packed_names(name) if reading.is_builders and not _FUSED_TYPES.intersection(model_types(config)) else None
    if packed is not None:
        return _packed(run, packed, reading, is_turned=is_turned)
    # Of all names one is enough: they are one matrix, so one layer's kind.
    stores_in_out = _stores_in_out(name, config) and len(run.shape) == 2
    return _taken(name, run.shape, is_turned=is_turned != stores_in_out)


def _taken(name: str, shape: tuple[int, ...], *, is_turned: bool) -> Taken:
    return Taken(tensor=name, permutation=(1, 0) if is_turned else None, shape=shape)


def _packed(run: Run, names: tuple[str, str, str], reading: _Reading, *, is_turned: bool) -> Origin | str:
    heads = {use.heads for use in reading.uses}
    found = next(iter(heads))
    if len(heads) != 1 or len(reading.names) != 1 or found is None:
        return "packed, and no attention tells the sizes of its parts"
    n_queries, n_keys = found
    axis = 1 if is_turned else 0
    size, rest = divmod(run.shape[axis], n_queries + 2 * n_keys)
    if rest:
        return f"packed, and {run.shape[axis]} features are no {n_queries} heads of queries and {n_keys} of keys"
    parts = []
    for name, n_heads in zip(names, (n_queries, n_keys, n_keys), strict=True):
        shape = list(run.shape)
        shape[axis] = n_heads * size
        parts.append(_taken(name, tuple(shape), is_turned=is_turned))
    return Joined(axis=axis, parts=tuple(parts))


def _stores_in_out(name: str, config: Mapping[str, Any]) -> bool:
    """Whether the checkpoint itself stores this layer's weight as (in, out)."""
    return not CONV1D_TYPES.isdisjoint(model_types(config)) and CONV1D_MODULES.search(name) is not None


def _unexplained(run: Run, reading: _Reading, reason: str) -> Iterator[Finding]:
    """Report what looks like a weight: a matrix that is multiplied with, or one that has a parameter's name."""
    is_multiplied = any(use.layout in {Layout.UPRIGHT, Layout.TURNED} for use in reading.uses)
    if len(run.shape) > 1 and (is_multiplied or any(name.endswith(".weight") for name in reading.names)):
        target = spell(reading.names) or spell(dict.fromkeys(reading.initializers))
        yield _finding(target, f"{reading.initializers[0]} {list(run.shape)}: {reason}")


def _quantised(graph: GraphFile, uses: Mapping[str, Sequence[Use]]) -> Iterator[Finding]:
    reported: set[str] = set()
    for tensor in graph.model.graph.initializer:
        for use in uses.get(tensor.name, ()):
            if any(operator in use.operator for operator in _QUANTISED):
                target = f"{use.module}.weight" if use.module else tensor.name
                if target not in reported:
                    yield _finding(
                        target, f"{tensor.name}: quantised, read by {use.operator}: it cannot take an update"
                    )
                reported.add(target)


def _finding(target: str, message: str) -> Finding:
    return Finding(code="unexplained-initializer", severity=Severity.WARN, target=target, message=message)
