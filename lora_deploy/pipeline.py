"""The stages in order: read, bind, plan, execute, verify. The only module that names them all.

    inspect   adapter ─▶ Inspection
    validate  adapters, base ─▶ Binding
    plan      adapters, base ─▶ MergePlan                 nothing is written
    merge     adapters, base ─▶ Merged                    plan, then execute
    export    merged folder, or adapters, base ─▶ Exported
    verify    merged folder ─▶ Evidence                   require_pass turns its verdict into an exception
    bench     exported folders ─▶ LatencyReport

ADAPTER is a folder, a file or a hub id; BASE a folder, a file or a hub id; a local path wins over a hub id of the same
name. Promise: no stage is skipped, none is run twice, and what a stage found is returned even where it is bad news.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from os import fspath
from pathlib import Path

from pydantic import TypeAdapter

from lora_deploy.adapters.interface import ReadOptions
from lora_deploy.bases import open_base
from lora_deploy.checkpoint import Checkpoint, CheckpointRef, open_checkpoint
from lora_deploy.companions import companion_files
from lora_deploy.errors import (
    EvidenceError,
    InconclusiveError,
    InputError,
    LatencyError,
    ParityError,
    RecipeError,
    ReplayError,
)
from lora_deploy.evidence.bench import bench
from lora_deploy.evidence.dossier import Evidence
from lora_deploy.evidence.gather import gather
from lora_deploy.evidence.options import VerifyOptions
from lora_deploy.evidence.outcome import NotApplicable
from lora_deploy.evidence.verdict import Check, Verdict
from lora_deploy.export.execute import Exported, execute_export
from lora_deploy.export.execute import default_output as default_export
from lora_deploy.export.generate import Answer, answer
from lora_deploy.export.options import ExportOptions
from lora_deploy.export.plan import ExportPlan, plan_export
from lora_deploy.export.record import RECORD_NAME as EXPORT_RECORD
from lora_deploy.export.sources import CheckpointSource, PlanSource, WeightSource
from lora_deploy.inspection import Inspection, inspect_adapter
from lora_deploy.merge.budget import estimate, require_disk
from lora_deploy.merge.compose import versions
from lora_deploy.merge.execute import Merged, execute, is_done
from lora_deploy.merge.identity import base_artifacts
from lora_deploy.merge.options import MergeOptions
from lora_deploy.merge.plan import MergePlan, plan_merge
from lora_deploy.merge.progress import Progress
from lora_deploy.merge.record import RECORD_NAME, MergeRecord, RecordedBase, read_record
from lora_deploy.pipeline_layout import SEPARATOR
from lora_deploy.references import Reference, References, named_base, read_named, several
from lora_deploy.updates.interface import Update
from lora_deploy.validate import Binding, BindOptions, bind

__all__ = [
    "Reference",
    "answer_prompt",
    "base_artifacts",
    "bench",
    "default_export",
    "default_output",
    "estimate",
    "execute",
    "execute_export",
    "export",
    "inspect",
    "is_done",
    "merge",
    "named_base",
    "plan",
    "plan_of_export",
    "require_disk",
    "require_pass",
    "validate",
    "verify",
]


def inspect(adapter: Reference, *, read_options: ReadOptions | None = None) -> Inspection:
    """Measure an adapter without its base.

    Raises:
        InputError: The file is not an adapter that can be read.
    """
    return inspect_adapter(read_named(adapter, read_options))


def validate(
    adapters: References,
    *,
    base: Reference | None = None,
    read_options: ReadOptions | None = None,
    bind_options: BindOptions | None = None,
    dequantize: bool = False,
) -> Binding:
    """Bind adapters, in order, to a base; without one, to the base that they name.

    Raises:
        IncompatibleAdapterError: Some updates do not fit; all of them are in ``findings``.
        InputError: A file is not what it claims to be.
        RecipeError: No base is named, or the options contradict each other.
    """
    read = [read_named(adapter, read_options) for adapter in several(adapters)]
    variant = bind_options.variant if bind_options is not None else None
    named = fspath(base) if base is not None else named_base(read)
    return bind(read, open_base(named, dequantize=dequantize, variant=variant), bind_options)


def plan(
    adapters: References,
    *,
    base: Reference | None = None,
    read_options: ReadOptions | None = None,
    bind_options: BindOptions | None = None,
    merge_options: MergeOptions | None = None,
    dequantize: bool = False,
) -> MergePlan:
    """Decide every byte of a merge and write nothing.

    Raises:
        LoraDeployError: As ``validate``; or the plan cannot be made.
    """
    binding = validate(adapters, base=base, read_options=read_options, bind_options=bind_options, dequantize=dequantize)
    return plan_binding(binding, read_options=read_options, merge_options=merge_options)


def plan_binding(
    binding: Binding, *, read_options: ReadOptions | None = None, merge_options: MergeOptions | None = None
) -> MergePlan:
    """Plan the merge of a binding, with the files that travel.

    Raises:
        LoraDeployError: As ``plan``.
    """
    companions = companion_files(binding.adapters, binding.checkpoint, binding.options.tokenizer)
    return plan_merge(binding, merge_options or MergeOptions(), read_options=read_options, companions=companions)


def merge(
    adapters: References,
    *,
    base: Reference | None = None,
    output: Reference | None = None,
    read_options: ReadOptions | None = None,
    bind_options: BindOptions | None = None,
    merge_options: MergeOptions | None = None,
    dequantize: bool = False,
    progress: Progress | None = None,
) -> Merged:
    """Merge adapters, in order, into a base, and write the result to a folder; resumes what was begun there.

    Raises:
        LoraDeployError: As ``plan``; or the plan cannot be carried out.
    """
    planned = plan(
        adapters,
        base=base,
        read_options=read_options,
        bind_options=bind_options,
        merge_options=merge_options,
        dequantize=dequantize,
    )
    return execute(planned, Path(output) if output is not None else default_output(planned), progress=progress)


def plan_of_export(
    folder: Reference | None = None,
    *,
    adapters: References = (),
    base: Reference | None = None,
    read_options: ReadOptions | None = None,
    bind_options: BindOptions | None = None,
    merge_options: MergeOptions | None = None,
    export_options: ExportOptions | None = None,
    dequantize: bool = False,
) -> ExportPlan:
    """Decide an export and write nothing; as ``export``.

    Raises:
        LoraDeployError: As ``export``.
    """
    options = export_options or ExportOptions()
    source: WeightSource
    if several(adapters):
        if folder is not None:
            raise RecipeError(
                f"{fspath(folder)}: found a merged folder and adapters, expected one of the two",
                hint="leave MERGED out to export what the adapters make of their base",
            )
        merge_options = replace(merge_options or MergeOptions(), dtype=options.dtype or "base")
        source = PlanSource(
            plan(
                adapters,
                base=base,
                read_options=read_options,
                bind_options=bind_options,
                merge_options=merge_options,
                dequantize=dequantize,
            )
        )
    elif base is not None:
        raise RecipeError("--base without --adapter: an export needs both, or a merged folder", hint="pass --adapter")
    else:
        checkpoint = open_checkpoint(_merged_folder(folder))
        source = CheckpointSource(checkpoint, companion_files((), checkpoint))
    return plan_export(source, options)


def export(  # noqa: PLR0913 - what merge takes, and what export takes
    folder: Reference | None = None,
    *,
    adapters: References = (),
    base: Reference | None = None,
    output: Reference | None = None,
    read_options: ReadOptions | None = None,
    bind_options: BindOptions | None = None,
    merge_options: MergeOptions | None = None,
    export_options: ExportOptions | None = None,
    dequantize: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Make ONNX graphs of a merged folder, or of adapters and their base without a merged checkpoint on disk.

    Without a folder and without adapters it is the current folder, if that holds our record. ``output`` defaults to
    ``<folder>/onnx``.

    Raises:
        ExportError: The graphs cannot be made, or their weights not be explained; or an option cannot be had.
        LoraDeployError: As ``plan``.
    """
    planned = plan_of_export(
        folder,
        adapters=adapters,
        base=base,
        read_options=read_options,
        bind_options=bind_options,
        merge_options=merge_options,
        export_options=export_options,
        dequantize=dequantize,
    )
    out = Path(output) if output is not None else default_export(planned)
    return execute_export(planned, out, progress=progress)


def answer_prompt(
    folder: Reference,
    prompt: str,
    *,
    max_tokens: int = 128,
    is_raw: bool = False,
    say: Callable[[str], None] | None = None,
) -> Answer:
    """Let the graphs in a folder, or in its folder ``onnx``, answer; ``say`` hears the text as it comes.

    Raises:
        InputError: There is no export.
        ExportError: It is no decoder with a tokenizer.
    """
    root = Path(folder)
    inner = root / "onnx"
    root = inner if not (root / EXPORT_RECORD).is_file() and (inner / EXPORT_RECORD).is_file() else root
    return answer(root, prompt, max_tokens=max_tokens, is_raw=is_raw, say=say)


def verify(  # noqa: PLR0913 - an option type a stage
    folder: Reference | None = None,
    *,
    adapters: References = (),
    base: Reference | None = None,
    options: VerifyOptions | None = None,
    read_options: ReadOptions | None = None,
    bind_options: BindOptions | None = None,
    merge_options: MergeOptions | None = None,
    dequantize: bool = False,
    progress: Progress | None = None,
) -> Evidence:
    """Check a merged checkpoint: weights, outputs, latency; without a folder, the current one if it holds our record.

    Where the folder holds our record, that says what was merged and how, and every byte must match; ``adapters`` and
    ``base`` then only say where the inputs lie now, and ``evidence.json`` is written beside the record. Any other
    folder needs ``adapters``. Of ``merge_options`` only memory, device and workers matter.

    Raises:
        RecipeError: Nothing says what was merged, or an option contradicts the record.
        InputError: An input is not the recorded one.
        LoraDeployError: As ``validate``.
    """
    root = _merged_folder(folder)
    planned, is_ours = _plan_of_folder(
        root, adapters, base, read_options, bind_options, merge_options, dequantize=dequantize, progress=progress
    )
    found = gather(planned, root, options or VerifyOptions(), is_ours=is_ours, progress=progress)
    found.write(root)
    return found


def _plan_of_folder(
    root: Path,
    adapters: References,
    base: Reference | None,
    read_options: ReadOptions | None,
    bind_options: BindOptions | None,
    merge_options: MergeOptions | None,
    *,
    dequantize: bool,
    progress: Progress | None,
) -> tuple[MergePlan, bool]:
    """Plan again what a folder holds; also whether every byte must match."""
    options = merge_options or MergeOptions()
    if (root / RECORD_NAME).is_file():
        if read_options or bind_options:
            raise RecipeError(
                f"{root}: its {RECORD_NAME} says with which options it was merged",
                hint="give none but --adapter and --base, which say where the inputs lie now",
            )
        record = read_record(root)
        planned = _recorded_plan(record, several(adapters), base, options, progress)
        return planned, _promises_bytes(record, planned)
    if not several(adapters):
        raise RecipeError(f"{root}: has no {RECORD_NAME}, so what was merged is unknown", hint="pass --adapter")
    planned = plan(
        adapters,
        base=base,
        read_options=read_options,
        bind_options=bind_options,
        merge_options=replace(options, dtype="base"),
        dequantize=dequantize,
    )
    return planned, False


def require_pass(found: Evidence, folder: Reference) -> None:
    """Turn a verdict into an exception; the gravest check speaks.

    Raises:
        ReplayError: Stored weights contradict the definition.
        ParityError: Outputs are not the unmerged model's.
        LatencyError: The merged graph does not take the base's time.
        InconclusiveError: Something could not be checked.
    """
    if found.verdict is Verdict.PASS:
        return
    said = {check: report for check, report in found.checks.items() if not isinstance(report, NotApplicable)}
    for check, report in said.items():
        if report.verdict is Verdict.FAIL:
            problem, error = _FAILURES[check]
            raise error(f"{fspath(folder)}: {problem}: {report.reason}", hint=report.hint or None)
    unclear = {check: report for check, report in said.items() if report.verdict is Verdict.INCONCLUSIVE}
    if not unclear:
        raise InconclusiveError(f"{fspath(folder)}: nothing was checked")
    reasons = "; ".join(f"{check}: {report.reason}" for check, report in unclear.items())
    hint = next((report.hint for report in unclear.values() if report.hint), None)
    raise InconclusiveError(f"{fspath(folder)}: could not be verified: {reasons}", hint=hint)


_FAILURES: Mapping[Check, tuple[str, type[EvidenceError]]] = {
    Check.REPLAY: ("is not the merge of its base and adapters", ReplayError),
    Check.PARITY: ("does not do what the unmerged model does", ParityError),
    Check.LATENCY: ("does not take the base's time", LatencyError),
}


def default_output(planned: MergePlan) -> Path:
    """Name the folder that a merge goes to when nobody says: ``<adapter-name>-merged``, here."""
    return Path("+".join(adapter.name for adapter in planned.binding.adapters) + "-merged")


def _merged_folder(folder: Reference | None) -> Path:
    root = Path(folder) if folder is not None else Path()
    if folder is None and not (root / RECORD_NAME).is_file():
        raise RecipeError(f"the current folder holds no {RECORD_NAME}", hint="name the merged folder")
    if not root.is_dir():
        raise InputError(f"{root}: no such folder")
    return root


def _recorded_plan(
    record: MergeRecord,
    adapters: Sequence[Reference],
    base: Reference | None,
    options: MergeOptions,
    progress: Progress | None,
) -> MergePlan:
    """Plan the recorded merge again, from inputs that are proven to be the recorded ones."""
    read_options = TypeAdapter(ReadOptions).validate_python(record.options["read"])
    bind_options = TypeAdapter(BindOptions).validate_python(record.options["bind"])
    read = [read_named(adapter, read_options) for adapter in adapters or [entry.path for entry in record.adapters]]
    _check_digests(
        "adapter",
        {str(adapter.path): adapter.sha256 for adapter in read},
        [entry.sha256 for entry in record.adapters],
    )
    variant = bind_options.variant
    checkpoint = _recorded_base(record.base, variant) if base is None else open_base(fspath(base), variant=variant)
    files = base_artifacts(checkpoint, progress)
    _check_digests(
        "base",
        {str(checkpoint.root / file.path): file.sha256 for file in files},
        [file.sha256 for file in record.base.files],
    )
    binding = bind(read, checkpoint, bind_options)
    return plan_binding(binding, read_options=read_options, merge_options=replace(options, **record.options["merge"]))


def _promises_bytes(record: MergeRecord, planned: MergePlan) -> bool:
    """Whether every byte must be the same here: kinds defined in float64 promise it per torch build and CPU only."""
    here = versions()
    updates = (entry.update for tensor in planned.tensors for entry in tensor.updates)
    is_exact = all(update.is_exact for update in updates if isinstance(update, Update))
    return is_exact or all(record.versions.get(name) == here[name] for name in ("torch", "instruction_set"))


def _recorded_base(recorded: RecordedBase, variant: str | None) -> Checkpoint:
    root = Path(recorded.root)
    if not root.is_dir():
        name = f"{recorded.name}@{recorded.revision}" if recorded.revision else recorded.name
        return open_base(name, variant=variant)
    lone = tuple(file.path for file in recorded.files) if len(recorded.files) == 1 else None
    if lone is not None and SEPARATOR in lone[0]:  # a pipeline of one model
        lone = None
    ref = CheckpointRef(name=recorded.name, revision=recorded.revision)
    return open_checkpoint(root, ref=ref, files=lone, variant=variant)


def _check_digests(what: str, found: Mapping[str, str], expected: Sequence[str]) -> None:
    if len(found) != len(expected):
        raise InputError(f"{what}: found {len(found)} files, the record names {len(expected)}", code="input-changed")
    for (path, sha256), recorded in zip(found.items(), expected, strict=True):
        if sha256 != recorded:
            raise InputError(
                f"{path}: sha256 {sha256[:12]}…, the record says {recorded[:12]}…: not the {what} that was merged",
                hint=f"say with --{what} where that lies now",
                code="input-changed",
            )
