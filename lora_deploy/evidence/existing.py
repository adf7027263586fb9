"""Evidence for a merge into an existing export: its files replayed, its time by the same graphs.

There is no torch model of such a base, so outputs are not compared with an unmerged one: that the files are what base
and adapters give, byte for byte, is the evidence, and says so.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from lora_deploy.errors import InputError
from lora_deploy.evidence.dossier import Evidence
from lora_deploy.evidence.gather import LEFT_OUT, NO_GRAPHS
from lora_deploy.evidence.graphs import GraphFolder, find_graphs
from lora_deploy.evidence.latency import (
    LatencyOptions,
    LatencyReport,
    Proof,
    check_latency,
    conclude,
    proof_of,
    prove_by,
)
from lora_deploy.evidence.options import VerifyOptions
from lora_deploy.evidence.outcome import NotApplicable, Outcome, TensorOutcome
from lora_deploy.evidence.replay import ReplayReport
from lora_deploy.evidence.verdict import Check, Verdict
from lora_deploy.export.canonical import canonical_digest, first_difference
from lora_deploy.export.existing.base import OnnxBase
from lora_deploy.export.existing.replay import Difference, replay_existing
from lora_deploy.merge.plan import MergePlan
from lora_deploy.merge.progress import Progress

_NO_MODEL = NotApplicable(
    reason="the base is an ONNX export, of which there is no torch model to run unmerged; "
    "what its replayed weights do is the base's own graph"
)


def gather_existing(
    plan: MergePlan, folder: Path, options: VerifyOptions, *, is_ours: bool, progress: Progress | None = None
) -> Evidence:
    """Check a merge into an export against its plan.

    Raises:
        InputError: The folder's files cannot be read.
        RecipeError: No provider has the name that was given.
    """
    replayed: ReplayReport | None = None
    latency: LatencyReport | NotApplicable = LEFT_OUT
    if options.includes(Check.REPLAY) or options.includes(Check.LATENCY):
        replayed = _replay(plan, folder, is_ours=is_ours, progress=progress)
    if options.includes(Check.LATENCY):
        assert replayed is not None  # noqa: S101 - the condition above is wider
        latency = _latency(plan, folder, options, replayed, progress)
    return Evidence(
        replay=replayed if replayed is not None and options.includes(Check.REPLAY) else LEFT_OUT,
        parity=_NO_MODEL if options.includes(Check.PARITY) else LEFT_OUT,
        latency=latency,
    )


def _replay(plan: MergePlan, folder: Path, *, is_ours: bool, progress: Progress | None) -> ReplayReport:
    started = time.monotonic()
    differences = [*replay_existing(plan, folder, progress)]
    wrong = {name for difference in differences for name in difference.tensors}
    outcomes = [
        TensorOutcome(name=tensor.spec.name, outcome=Outcome.EXACT, n_elements=tensor.spec.n_elements)
        for tensor in plan.tensors
        if tensor.spec.name not in wrong
    ]
    outcomes += [outcome for difference in differences for outcome in _outcomes(difference, is_ours=is_ours)]
    bad = {entry.outcome for entry in outcomes} - {Outcome.EXACT}
    verdict = Verdict.FAIL if bad - {Outcome.INCONCLUSIVE} else Verdict.INCONCLUSIVE if bad else Verdict.PASS
    return ReplayReport(
        verdict=verdict,
        outcomes=tuple(outcomes),
        n_bytes=plan.n_bytes,
        tolerance="none: every byte of every file is the base's, or what base and adapters give",
        seconds=time.monotonic() - started,
        is_ours=True,
    )


def _outcomes(difference: Difference, *, is_ours: bool) -> Iterator[TensorOutcome]:
    if not difference.tensors:
        outcome = Outcome.WRONG_GRAPH if difference.file.endswith(".onnx") else Outcome.WRONG_LAYOUT
    elif not difference.is_adapted:
        outcome = Outcome.CHANGED
    elif difference.is_base:
        outcome = Outcome.NOT_APPLIED
    else:  # kinds defined in float64 promise the same bytes per torch build and CPU only
        outcome = Outcome.UNEXPLAINED if is_ours else Outcome.INCONCLUSIVE
    for name in difference.tensors or (difference.file,):
        yield TensorOutcome(name=name, outcome=outcome, message=difference.message)


def _latency(
    plan: MergePlan, folder: Path, options: VerifyOptions, replayed: ReplayReport, progress: Progress | None
) -> LatencyReport | NotApplicable:
    base = plan.binding.checkpoint
    assert isinstance(base, OnnxBase)  # noqa: S101 - the caller asked
    found = [_folder(root, base.graphs) for root in (folder, base.root)]
    merged, before = found
    if merged is None or before is None:
        return NO_GRAPHS
    chosen = LatencyOptions(bound=options.latency_bound, seconds=options.seconds, provider=options.provider)
    compare = prove_by(canonical_digest, first_difference)

    def prove(left: Path, right: Path) -> Proof:
        proof = compare(left, right)
        if replayed.verdict is Verdict.PASS:  # a digest takes an adapted weight for a constant where it is small
            return proof if proof.is_equal else Proof(is_equal=True, reason="only adapted weights differ")
        if proof.is_equal:
            return Proof(is_equal=False, reason=f"the weights are not the merged ones: {replayed.reason}")
        return proof

    try:
        return check_latency(merged, before, plan.config, chosen, prove=prove, progress=progress)
    except InputError as error:  # nobody but the exporter knows what this graph wants to be given
        proof = proof_of(merged, before, prove)
        verdict, reason = conclude(proof, None)
        return LatencyReport(verdict=verdict, reason=reason or f"not measured: {error.message}", proof=proof)


def _folder(root: Path, graphs: tuple[str, ...]) -> GraphFolder | None:
    if len(graphs) == 1:
        return find_graphs(root / graphs[0])
    return find_graphs(root)
