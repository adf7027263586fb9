"""Check a folder by its own record, or by what the user says was merged; turn a verdict into an exception."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from os import fspath
from pathlib import Path

from pydantic import TypeAdapter

from lora_deploy.adapters.interface import ReadOptions
from lora_deploy.artifact import cached_sha256
from lora_deploy.bases import open_base
from lora_deploy.checkpoint import Checkpoint, CheckpointRef, open_checkpoint
from lora_deploy.errors import (
    EvidenceError,
    InconclusiveError,
    InputError,
    LatencyError,
    ParityError,
    RecipeError,
    ReplayError,
)
from lora_deploy.evidence.dossier import Evidence
from lora_deploy.evidence.existing import gather_existing
from lora_deploy.evidence.gather import gather
from lora_deploy.evidence.options import VerifyOptions
from lora_deploy.evidence.pipeline_evidence import gather_pipeline
from lora_deploy.evidence.spectra import spectra_of
from lora_deploy.evidence.verdict import Check, Verdict
from lora_deploy.export.existing.base import OnnxBase
from lora_deploy.export.existing.open import open_onnx_base
from lora_deploy.export.record import RECORD_NAME as EXPORT_RECORD
from lora_deploy.export.record import read_record as read_export_record
from lora_deploy.merge.compose import versions
from lora_deploy.merge.identity import base_artifacts
from lora_deploy.merge.options import MergeOptions
from lora_deploy.merge.plan import MergePlan
from lora_deploy.merge.progress import Progress
from lora_deploy.merge.record import (
    RECORD_NAME,
    MergeRecord,
    RecordedBase,
    RecordedOrigin,
    merged_folder,
    read_record,
)
from lora_deploy.pipeline.merging import open_named, plan, plan_binding
from lora_deploy.pipeline_layout import SEPARATOR
from lora_deploy.references import Reference, References, read_named, several
from lora_deploy.release.manifest import MANIFEST_NAME
from lora_deploy.release.manifest import check as check_release
from lora_deploy.release.sign import check_signature
from lora_deploy.updates.interface import Update
from lora_deploy.validate import BindOptions, bind


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
    public_key: Path | None = None,
    certificate: Path | None = None,
    progress: Progress | None = None,
) -> Evidence:
    """Check a merged checkpoint, or an export straight from adapter and base: weights, outputs, latency.

    Without a folder it is the current one, if it holds our record. Where a folder holds our record, that says what was
    merged and how, and every byte must match; ``adapters`` and ``base`` then only say where the inputs lie now, and
    ``evidence.json`` is written beside the record; a release is compared with its manifest first, and keeps the
    evidence that it was released with. Any other folder needs ``adapters``. Of ``merge_options`` only memory, device
    and workers matter.

    Raises:
        RecipeError: Nothing says what was merged, or an option contradicts the record.
        InputError: An input is not the recorded one.
        ReleaseError: A release is not what its manifest says.
        LoraDeployError: As ``validate``.
    """
    root = merged_folder(folder, EXPORT_RECORD)
    is_released = (root / MANIFEST_NAME).is_file()
    if is_released:
        check_release(root, progress)
    if public_key is not None or certificate is not None:
        check_signature(root, public_key, certificate=certificate)
    planned, is_ours, is_direct = _plan_of_folder(
        root, adapters, base, read_options, bind_options, merge_options, dequantize=dequantize, progress=progress
    )
    chosen = options or VerifyOptions()
    if isinstance(planned.binding.checkpoint, OnnxBase):
        found = gather_existing(planned, root, chosen, is_ours=is_ours, progress=progress)
    else:
        check = gather_pipeline if planned.binding.checkpoint.components else gather
        found = check(planned, root, chosen, is_ours=is_ours, is_direct=is_direct, progress=progress)
    found = replace(found, files=_checked_files(root), spectra=spectra_of(planned.binding))
    if not is_released:
        found.write(root)
    return found


def _checked_files(root: Path) -> dict[str, str]:
    """Digest what the records of a folder name: weights, and graphs in folders inside; what is gone is left out."""
    names = [file.path for file in read_record(root).artifacts] if (root / RECORD_NAME).is_file() else []
    for record in (root / EXPORT_RECORD, *sorted(root.glob(f"*/{EXPORT_RECORD}"))):
        with suppress(InputError):  # another exporter's
            place = record.parent.relative_to(root)
            names += [(place / file.path).as_posix() for file in read_export_record(record.parent).artifacts]
    return {name: cached_sha256(root / name) for name in names if (root / name).is_file()}


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
    for check, report in found.reports:
        if report.verdict is Verdict.FAIL:
            problem, error = _FAILURES[check]
            raise error(f"{fspath(folder)}: {problem}: {report.reason}", hint=report.hint or None)
    unclear = [(check, report) for check, report in found.reports if report.verdict is Verdict.INCONCLUSIVE]
    if not unclear:
        raise InconclusiveError(f"{fspath(folder)}: nothing was checked")
    reasons = "; ".join(f"{check}: {report.reason}" for check, report in unclear)
    hint = next((report.hint for _, report in unclear if report.hint), None)
    raise InconclusiveError(f"{fspath(folder)}: could not be verified: {reasons}", hint=hint)


_FAILURES: Mapping[Check, tuple[str, type[EvidenceError]]] = {
    Check.REPLAY: ("is not the merge of its base and adapters", ReplayError),
    Check.PARITY: ("does not do what the unmerged model does", ParityError),
    Check.LATENCY: ("does not take the base's time", LatencyError),
}


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
) -> tuple[MergePlan, bool, bool]:
    """Plan again what a folder holds; also whether every byte must match, and whether it is a direct export."""
    options = merge_options or MergeOptions()
    found = _origin_of(root)
    if found is not None:
        origin, name = found
        if read_options or bind_options:
            raise RecipeError(
                f"{root}: its {name} says with which options it was merged",
                hint="give none but --adapter and --base, which say where the inputs lie now",
            )
        planned = _recorded_plan(origin, several(adapters), base, options, dequantize=dequantize, progress=progress)
        return planned, _promises_bytes(origin, planned), name == EXPORT_RECORD
    if not several(adapters):
        is_export = (root / EXPORT_RECORD).is_file()
        hint = "verify the merged folder, its graphs are checked with it" if is_export else "pass --adapter"
        raise RecipeError(f"{root}: has no {RECORD_NAME}, so what was merged is unknown", hint=hint)
    planned = plan(
        adapters,
        base=base,
        read_options=read_options,
        bind_options=bind_options,
        merge_options=replace(options, dtype="base"),
        dequantize=dequantize,
    )
    return planned, False, False


def _origin_of(root: Path) -> tuple[MergeRecord | RecordedOrigin, str] | None:
    """Read from what a folder was made, and the name of the file that says it; None where nothing of ours does."""
    if (root / RECORD_NAME).is_file():
        return read_record(root), RECORD_NAME
    try:
        origin = read_export_record(root).origin
    except InputError:
        return None  # another exporter's, or none
    return (origin, EXPORT_RECORD) if origin is not None else None


def _recorded_plan(
    record: MergeRecord | RecordedOrigin,
    adapters: Sequence[Reference],
    base: Reference | None,
    options: MergeOptions,
    *,
    dequantize: bool,
    progress: Progress | None,
) -> MergePlan:
    """Plan the recorded merge again, from inputs that are proven to be the recorded ones."""
    read_options = TypeAdapter(ReadOptions).validate_python(record.options["read"])
    bind_options = TypeAdapter(BindOptions).validate_python(record.options["bind"])
    read = [read_named(adapter, read_options) for adapter in adapters or _recorded_places(record)]
    _check_digests(
        "adapter",
        {str(adapter.path): adapter.sha256 for adapter in read},
        [entry.sha256 for entry in record.adapters],
    )
    variant = bind_options.variant
    checkpoint = (
        _recorded_base(record.base, variant, dequantize=dequantize)
        if base is None
        else open_named(fspath(base), dequantize=dequantize, variant=variant)
    )
    files = base_artifacts(checkpoint, progress)
    _check_digests(
        "base",
        {str(checkpoint.root / file.path): file.sha256 for file in files},
        [file.sha256 for file in record.base.files],
    )
    binding = bind(read, checkpoint, bind_options)
    return plan_binding(binding, read_options=read_options, merge_options=replace(options, **record.options["merge"]))


def _recorded_places(record: MergeRecord | RecordedOrigin) -> list[str]:
    """List where the adapters lay.

    Raises:
        InputError: A release: it names its inputs by digest, not by place.
    """
    places = [entry.path for entry in record.adapters]
    if not record.base.root and not all(Path(place).exists() for place in places):
        raise InputError(
            f"adapter {places[0]}: is not here: a release names what it was made of by digest, not by place",
            hint="say with --adapter where it lies, and with --base where the base does, unless it is a hub id",
            code="input-elsewhere",
        )
    return places


def _promises_bytes(record: MergeRecord | RecordedOrigin, planned: MergePlan) -> bool:
    """Whether every byte must be the same here: kinds defined in float64 promise it per torch build and CPU only."""
    here = versions()
    updates = (entry.update for tensor in planned.tensors for entry in tensor.updates)
    is_exact = all(update.is_exact for update in updates if isinstance(update, Update))
    return is_exact or all(record.versions.get(name) == here[name] for name in ("torch", "instruction_set"))


def _recorded_base(recorded: RecordedBase, variant: str | None, *, dequantize: bool) -> Checkpoint:
    root = Path(recorded.root)
    if not recorded.root or not root.is_dir():  # a release names no place
        name = f"{recorded.name}@{recorded.revision}" if recorded.revision else recorded.name
        return open_base(name, dequantize=dequantize, variant=variant)
    graphs = [file.path for file in recorded.files if file.path.endswith(".onnx")]
    if graphs:
        return open_onnx_base(root, graphs)
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
