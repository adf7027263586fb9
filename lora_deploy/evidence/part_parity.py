"""Compare one part of a model on every side, on the inputs that the unmerged model gives it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_deploy.errors import EvidenceError
from lora_deploy.evidence.architecture import Absence
from lora_deploy.evidence.chanced import DTypes
from lora_deploy.evidence.divergence import Divergence, Divergences, compare_outputs, join
from lora_deploy.evidence.forward import LOGITS, rows_of
from lora_deploy.evidence.magnitude import recording
from lora_deploy.evidence.parity_report import SubjectReport
from lora_deploy.evidence.passage import Stop
from lora_deploy.evidence.probe import SEED, Probe
from lora_deploy.evidence.reference import UnmergedParts
from lora_deploy.evidence.skeleton import Skeleton, placed
from lora_deploy.evidence.subject import compare_subject
from lora_deploy.evidence.tolerance import N_SEEDS, Power, Tolerance, merge_share
from lora_deploy.evidence.verdict import Verdict

_HIDDEN = "hidden states"
_Rows = dict[str, dict[str, Tensor]]
_Answer = Callable[[str, Any], None]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sides:
    """What is compared, with what it takes to judge it."""

    base: Skeleton
    merged: Skeleton
    beside: UnmergedParts
    dtypes: DTypes
    probes: Mapping[str, Probe]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PartReport:
    """One part, judged."""

    subject: SubjectReport
    effect: tuple[Divergence, ...] = ()
    """Unmerged against base."""
    power: tuple[Power, ...] = ()
    """Where the adapter changes the part."""
    magnitudes: Mapping[str, float]
    outputs: Mapping[str, Mapping[str, Tensor]]
    """The unmerged model's, by probe and output."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Reference:
    """What the base's side gave."""

    outputs: _Rows
    base: _Rows
    """By the length of ``outputs``."""
    roundings: tuple[Divergences, ...]
    magnitudes: Mapping[str, float]


def compare_part(sides: Sides, stop: Stop, *, index: int, is_adapted: bool) -> PartReport:
    """Run one part on every side, and answer the pass with the unmerged model's outputs.

    A part that no update changes and whose weights are the base's, to the bit, has nothing to compare.

    Raises:
        EvidenceError: A checkpoint lacks the part's weights, or the part does not run.
    """
    name = f"merged checkpoint, {stop.part}"
    weights = sides.base.read(stop.part)
    is_same = not is_adapted and _are_equal(weights, sides.merged.read(stop.part))
    reference = _run_reference(sides, stop, weights, SEED + N_SEEDS * index, is_compared=not is_same)
    if is_same:
        facts = {"part": stop.part, "has_the_bases_weights": True}
        subject = SubjectReport(name=name, verdict=Verdict.PASS, reason="", by_probe={}, facts=facts)
        return PartReport(subject=subject, magnitudes=reference.magnitudes, outputs=reference.outputs)
    del weights
    module = sides.merged.model.get_submodule(stop.part)
    with placed(module, sides.merged.read(stop.part), lambda inner: f"{stop.part}.{inner}"):
        found = _by_length(_run(sides, stop, module), reference.outputs)
    shares = merge_share(reference.roundings, sides.dtypes.usual.long_name)
    tolerances = {output: Tolerance(output=output, shares=(share,)) for output, share in shares.items()}
    expected = _by_length(reference.outputs, reference.outputs)
    subject = compare_subject(name, found, expected, tolerances, {"part": stop.part})
    effect = tuple(
        replace(entry, output=f"{stop.part}: {entry.output}")
        for entry in join(compare_outputs(expected, reference.base))
    )
    power = tuple(
        Power(output=entry.output, effect=entry.mean, tolerance=tolerances[entry.output.rpartition(": ")[2]].mean)
        for entry in effect
        if is_adapted
    )
    return PartReport(
        subject=_weighed(subject, power),
        effect=effect,
        power=power,
        magnitudes=reference.magnitudes,
        outputs=reference.outputs,
    )


def _are_equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def _weighed(subject: SubjectReport, power: tuple[Power, ...]) -> SubjectReport:
    """Take a pass back where a missing adapter would have passed as well."""
    if subject.verdict is not Verdict.PASS or not power or any(entry.is_enough for entry in power):
        return subject
    ratio = max(entry.ratio for entry in power)
    reason = f"the adapter's effect on it is {ratio:.2g} times the tolerance: a missing one would hardly have shown"
    return replace(subject, verdict=Verdict.INCONCLUSIVE, reason=reason)


def _run_reference(
    sides: Sides, stop: Stop, weights: Mapping[str, Tensor], seed: int, *, is_compared: bool
) -> _Reference:
    """Run base, unmerged model and its roundings by chance, with one copy of the base's weights."""
    bare = sides.base.model.get_submodule(stop.part)
    module = sides.beside.model.get_submodule(stop.part)
    roundings = []
    with (
        placed(bare, weights, lambda name: f"{stop.part}.{name}"),
        placed(module, weights, lambda name: sides.beside.base_name(f"{stop.part}.{name}")),
        sides.beside.part(stop.part) as rounded,
    ):
        if isinstance(rounded, Absence):
            raise EvidenceError(f"{stop.part}: {rounded.reason}")
        with recording(_inside(sides.beside.modules, stop.part)) as magnitudes:
            outputs = _run(sides, stop, module, stop.answer)
        expected = _by_length(outputs, outputs)
        base = _by_length(_run(sides, stop, bare), outputs) if is_compared else {}
        for k in range(N_SEEDS if is_compared else 0):
            with rounded(sides.dtypes, torch.Generator().manual_seed(seed + k)):
                roundings.append(compare_outputs(expected, _by_length(_run(sides, stop, module), outputs)))
    return _Reference(outputs=outputs, base=base, roundings=tuple(roundings), magnitudes=magnitudes)


def _by_length(rows: _Rows, reference: _Rows) -> _Rows:
    """Divide every row of hidden states by the length of the reference's.

    Models keep a few positions, such as the first, a thousand times longer than the others. Undivided, their rounding
    would be all that is seen. Logits stay: what they mean does not depend on their length.
    """
    return {
        probe: {
            name: values if name == LOGITS else values / _lengths(reference[probe][name])
            for name, values in outputs.items()
        }
        for probe, outputs in rows.items()
    }


def _lengths(rows: Tensor) -> Tensor:
    """Give (n, 1); 1 for rows of zeros."""
    found = rows.norm(dim=1, keepdim=True)
    return torch.where(found > 0, found, torch.ones_like(found))


def _inside(modules: Mapping[str, nn.Module], part: str) -> dict[str, nn.Module]:
    return {name: module for name, module in modules.items() if f"{name}.".startswith(f"{part}.")}


def _run(sides: Sides, stop: Stop, module: nn.Module, answer: _Answer | None = None) -> _Rows:
    output_name = LOGITS if stop.part == sides.base.head else _HIDDEN
    empty = next((name for name, parameter in module.named_parameters() if parameter.is_meta), None)
    if empty is not None:
        raise EvidenceError(f"{stop.part}: {empty} has no values")  # torch would compute with whatever is in memory
    found = {}
    for name, call in stop.calls.items():
        probe = sides.probes[name]
        try:
            output = call.of(module)
        except Exception as error:  # the part's own code may raise anything
            problem = f"{type(error).__name__}: {error}"
            raise EvidenceError(f"{stop.part} does not run by itself on {probe.description}: {problem}") from error
        value = next(_floats_in(output), None)
        if value is None:
            raise EvidenceError(f"{stop.part} gives nothing that could be compared")
        found[name] = {output_name: rows_of(probe, value)}
        if answer is not None:
            answer(name, output)
    return found


def _floats_in(output: Any) -> Iterator[Tensor]:  # noqa: ANN401 - a tensor, or a tuple that begins with one
    for value in torch.utils._pytree.tree_leaves(output):  # noqa: SLF001 - has no public name
        if isinstance(value, Tensor) and value.is_floating_point():
            yield value
