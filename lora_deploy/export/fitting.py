"""Does an adapter fit graphs with LoRA inputs? Kinds, names, shapes, ranks and formats, every misfit at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from lora_deploy.adapter import Adapter, ModuleUpdate
from lora_deploy.checkpoint import Checkpoint, CheckpointRef
from lora_deploy.errors import Finding, IncompatibleAdapterError, RecipeError, Severity
from lora_deploy.export.adapter_file import read_ports
from lora_deploy.export.factors import changes_of_structure, no_factors, ranks_of
from lora_deploy.export.record import RecordedInputs
from lora_deploy.export.switchable import SwitchableGraph
from lora_deploy.tensors import TensorSpec
from lora_deploy.updates.low_rank import LowRank
from lora_deploy.validate import Binding, BindOptions, bind
from lora_deploy.validate.findings import lines_of, title

_NOT_PLAIN = "found a {} update, expected plain low-rank factors"
_NO_INPUT = "the graphs have no inputs for it"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """An adapter that fits."""

    adapter: str
    n_ports: int
    """Pairs of inputs that the graph has."""
    ranks: Mapping[str, int]
    """Of what the adapter changes, by tensor or input name."""


def check_fit(adapter: Adapter, graph: SwitchableGraph, options: BindOptions | None = None) -> Fit:
    """Check an adapter as it was trained.

    Raises:
        IncompatibleAdapterError: It does not fit; every misfit is in ``findings``.
    """
    checkpoint = _as_checkpoint(graph)
    plain = replace(adapter, updates=tuple(entry for entry in adapter.updates if _kind(entry) == LowRank.kind))
    others = [entry for entry in adapter.updates if entry not in plain.updates]
    findings = [_error(f"kind-{_kind(entry)}", entry.target, _NOT_PLAIN.format(_kind(entry))) for entry in others]
    ranks: dict[str, int] = {}
    try:
        binding = bind([plain], checkpoint, options)
    except IncompatibleAdapterError as error:
        findings += [_in_graphs_words(found) for found in error.findings if found.severity is Severity.ERROR]
        for binding in _bound_alone(plain, checkpoint, options):
            findings += misfits(binding.updates, graph.ports)
    else:
        findings += [*changes_of_structure(binding), *no_factors(binding), *misfits(binding.updates, graph.ports)]
        ranks = {name: ranks_of(entries) for name, entries in binding.updates.items()}
    if findings:
        raise misfit(title(adapter), graph.path, findings)
    return Fit(adapter=title(adapter), n_ports=len(graph.ports), ranks=ranks)


def check_file(file: Path, graph: SwitchableGraph) -> Fit:
    """Check a file of onnxruntime's.

    Raises:
        IncompatibleAdapterError: It does not fit; every misfit is in ``findings``.
        MalformedAdapterError: It is no such file.
    """
    parameters = read_ports(file)
    findings: list[Finding] = []
    for name, (dtype, shape) in parameters.items():
        findings += _misfits_of_parameter(name, dtype, shape, graph)
    ranks: dict[str, int] = {}
    for tensor, port in graph.ports.items():
        down, up = (parameters[name][1] if name in parameters else None for name in (port.down, port.up))
        if down is None and up is None:
            continue
        if down is None or up is None:
            missing = port.down if down is None else port.up
            findings.append(_error("half-missing", missing, "the file has only the other factor of this product"))
        elif len(down) == len(up) == 2 and down[1] != up[0]:
            findings.append(_error("rank-mismatch", tensor, f"A has rank {down[1]}, B has rank {up[0]}"))
        else:
            ranks[tensor] = down[-1]
    if findings:
        raise misfit(str(file), graph.path, findings)
    return Fit(adapter=str(file), n_ports=len(graph.ports), ranks=ranks)


def misfits(updates: Mapping[str, Sequence[ModuleUpdate]], ports: Mapping[str, RecordedInputs]) -> Iterator[Finding]:
    """Say what of bound updates a graph cannot take."""
    for name, entries in updates.items():
        port = ports.get(name)
        if port is None:
            yield _error("no-input", name, _NO_INPUT)
        elif port.rank is not None and port.rank != ranks_of(entries):
            found = f"adapter has rank {ranks_of(entries)}, the graph is made for {port.rank} and no other"
            yield _error("rank-mismatch", name, found)


def misfit(adapter: str, graph: Path, findings: Sequence[Finding]) -> IncompatibleAdapterError:
    """Make the error that lists every misfit."""
    counted = f"{len(findings)} error{'' if len(findings) == 1 else 's'}"
    message = "\n".join([f"adapter {adapter} does not fit the graphs of {graph}: {counted}", *lines_of(findings)])
    is_missing = any(finding.code == "no-input" for finding in findings)
    hint = "export again with --targets all-linear, so that these matrices have inputs" if is_missing else None
    return IncompatibleAdapterError(message, findings=tuple(findings), hint=hint)


def _bound_alone(adapter: Adapter, checkpoint: Checkpoint, options: BindOptions | None) -> Iterator[Binding]:
    """Bind every update by itself; those that do not fit were listed before."""
    for entry in adapter.updates:
        with suppress(IncompatibleAdapterError, RecipeError):
            yield bind([replace(adapter, updates=(entry,))], checkpoint, options)


def _kind(entry: ModuleUpdate) -> str:
    return str(getattr(entry.update, "kind", "stack-of-experts"))


def _misfits_of_parameter(name: str, dtype: str, shape: tuple[int, ...], graph: SwitchableGraph) -> Iterator[Finding]:
    found = graph.inputs.get(name)
    if found is None:
        yield _error("no-input", name, _NO_INPUT + _nearest(name, graph.inputs))
        return
    wanted, sizes = found
    if dtype != wanted:
        yield _error("dtype-mismatch", name, f"file has {dtype}, graph takes {wanted}")
    if len(shape) != len(sizes) or any(isinstance(w, int) and w != f for f, w in zip(shape, sizes, strict=True)):
        is_fixed = all(isinstance(size, int) for size in sizes)
        why = ": its rank is fixed" if is_fixed else ""
        yield _error("shape-mismatch", name, f"file has {list(shape)}, graph takes {list(sizes)}{why}")


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    found = get_close_matches(name, known, n=2, cutoff=0.7)
    return f"; nearest: {', '.join(found)}" if found else ""


def _in_graphs_words(found: Finding) -> Finding:
    """Findings about a base, which here is a list of matrices that a graph has inputs for."""
    if found.code == "target-missing":
        message = found.message.replace("not in base", _NO_INPUT)
        return replace(found, code="no-input", message=message)
    return replace(found, message=found.message.replace("base is", "graph takes"))


def _as_checkpoint(graph: SwitchableGraph) -> Checkpoint:
    """A base that has nothing but the matrices which a graph has inputs for."""
    specs, start = {}, 0
    for name, port in graph.ports.items():
        shape = (port.n_out, port.n_in) if port.is_turned else (port.n_in, port.n_out)
        n_bytes = port.n_in * port.n_out * port.dtype.n_bytes
        specs[name] = TensorSpec(name=name, dtype=port.dtype, shape=shape, file="", start=start, stop=start + n_bytes)
        start += n_bytes
    ref = CheckpointRef(name=str(graph.path))
    return Checkpoint(root=graph.folder, ref=ref, config=graph.config, tensors=specs, data_starts={})


def _error(code: str, target: str, message: str) -> Finding:
    return Finding(code=code, severity=Severity.ERROR, target=target, message=message)
