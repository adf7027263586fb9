"""The stages in order: read, bind, plan, execute, verify. The only module that names them all.

    inspect   adapter ─▶ Inspection
    validate  adapters, base ─▶ Binding
    plan      adapters, base ─▶ MergePlan                 nothing is written
    merge     adapters, base ─▶ Merged                    plan, then execute
    export    merged folder, or adapters, base ─▶ Exported
    verify    merged folder ─▶ Evidence                   require_pass turns its verdict into an exception
    bench     exported folders ─▶ LatencyReport
    release   merged folder, graphs, evidence ─▶ Release
    push      release, target ─▶ Receipt                  pull fetches one back

ADAPTER is a folder, a file or a hub id; BASE a folder, a file or a hub id; a local path wins over a hub id of the same
name. Promise: no stage is skipped, none is run twice, and what a stage found is returned even where it is bad news.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from os import fspath
from pathlib import Path

from pydantic import TypeAdapter

from lora_deploy.adapters.interface import ReadOptions
from lora_deploy.artifact import cached_sha256
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
from lora_deploy.evidence.existing import gather_existing
from lora_deploy.evidence.gather import gather
from lora_deploy.evidence.options import VerifyOptions
from lora_deploy.evidence.pipeline_evidence import gather_pipeline
from lora_deploy.evidence.spectra import spectra_of
from lora_deploy.evidence.verdict import Check, Verdict
from lora_deploy.export.adapter_file import SUFFIX as ADAPTER_SUFFIX
from lora_deploy.export.adding import add_adapters, multi_lora_of
from lora_deploy.export.execute import Exported, execute_export
from lora_deploy.export.execute import default_output as default_export
from lora_deploy.export.existing.base import OnnxBase
from lora_deploy.export.existing.form import OnnxForm
from lora_deploy.export.existing.open import is_onnx_base, open_onnx_base
from lora_deploy.export.existing.plan import plan_existing
from lora_deploy.export.fitting import Fit, check_file, check_fit
from lora_deploy.export.generate import Answer, answer
from lora_deploy.export.multi_lora import MultiLoraPlan, NamedAdapter, execute_multi_lora, plan_multi_lora
from lora_deploy.export.options import ExportOptions
from lora_deploy.export.plan import ExportPlan, plan_export, plan_of_folder
from lora_deploy.export.record import RECORD_NAME as EXPORT_RECORD
from lora_deploy.export.record import read_record as read_export_record
from lora_deploy.export.sources import PlanSource, WeightSource
from lora_deploy.export.switchable import open_switchable
from lora_deploy.hubs.interface import Preview
from lora_deploy.hubs.options import PushOptions
from lora_deploy.inspection import Inspection, inspect_adapter
from lora_deploy.merge.budget import estimate, require_disk
from lora_deploy.merge.compose import versions
from lora_deploy.merge.execute import Merged, is_done
from lora_deploy.merge.execute import execute as execute_merge
from lora_deploy.merge.identity import base_artifacts
from lora_deploy.merge.options import MergeOptions
from lora_deploy.merge.plan import MergePlan, plan_merge
from lora_deploy.merge.progress import Progress
from lora_deploy.merge.record import (
    RECORD_NAME,
    MergeRecord,
    RecordedBase,
    RecordedOrigin,
    merged_folder,
    read_record,
)
from lora_deploy.pipeline_layout import SEPARATOR
from lora_deploy.push import Receipt, preview
from lora_deploy.push import pull as fetch_release
from lora_deploy.push import push as publish_release
from lora_deploy.references import Reference, References, named_base, named_reference, read_named, several
from lora_deploy.release.assemble import Release, assemble, default_graphs
from lora_deploy.release.manifest import MANIFEST_NAME, Manifest
from lora_deploy.release.manifest import check as check_release
from lora_deploy.release.options import ReleaseOptions
from lora_deploy.release.sign import check_signature
from lora_deploy.updates.interface import Update
from lora_deploy.validate import Binding, BindOptions, bind

__all__ = [
    "Reference",
    "add_to_export",
    "answer_prompt",
    "base_artifacts",
    "bench",
    "check_graph_fit",
    "default_export",
    "default_output",
    "default_release",
    "estimate",
    "execute",
    "execute_export",
    "execute_multi_lora",
    "export",
    "inspect",
    "is_done",
    "is_onnx",
    "merge",
    "named_base",
    "plan",
    "plan_of_export",
    "plan_of_multi_lora",
    "preview_push",
    "pull",
    "push",
    "release",
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
    return bind(read, _open(named, dequantize=dequantize, variant=variant), bind_options)


def is_onnx(base: Reference | None) -> bool:
    """Whether a base is an existing ONNX export: merging into it keeps its graphs."""
    return base is not None and is_onnx_base(base)


def _open(base: str, *, dequantize: bool = False, variant: str | None = None) -> Checkpoint:
    """Open a base by what the user typed, an existing export among the rest."""
    return open_onnx_base(base) if is_onnx_base(base) else open_base(base, dequantize=dequantize, variant=variant)


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
    if isinstance(binding.checkpoint, OnnxBase):
        own = merge_options or MergeOptions(dtype="base")
        return plan_existing(binding, own, read_options=read_options, companions=companions)
    return plan_merge(binding, merge_options or MergeOptions(), read_options=read_options, companions=companions)


def execute(planned: MergePlan, output: Path, *, progress: Progress | None = None) -> Merged:
    """Carry out a plan: a checkpoint, or the export that the base is, with merged weights.

    Raises:
        LoraDeployError: The plan cannot be carried out.
    """
    form = OnnxForm() if isinstance(planned.binding.checkpoint, OnnxBase) else None
    return execute_merge(planned, output, form=form, progress=progress)


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
        return plan_of_folder(folder, options)
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
    ``<folder>/onnx``, or ``<folder>/onnx-int4`` and the like where weights are quantised.

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


def plan_of_multi_lora(
    adapters: References = (),
    *,
    base: Reference | None = None,
    targets: Sequence[str] = (),
    read_options: ReadOptions | None = None,
    bind_options: BindOptions | None = None,
    merge_options: MergeOptions | None = None,
    export_options: ExportOptions | None = None,
    dequantize: bool = False,
) -> MultiLoraPlan:
    """Decide an export of a base with inputs for adapters, which may be called ``NAME=PATH``, and write nothing.

    ``targets`` are patterns of further matrices that get inputs, such as ``all-linear``.

    Raises:
        LoraDeployError: As ``validate``; or an adapter cannot be switched at run time, or the plan cannot be made.
    """
    options = export_options or ExportOptions()
    checkpoint, named = _named_adapters(adapters, base, read_options, bind_options, dequantize=dequantize)
    chosen = replace(merge_options or MergeOptions(), dtype=options.dtype or "base")
    source = PlanSource(plan_binding(bind((), checkpoint), merge_options=chosen))
    return plan_multi_lora(plan_export(source, options), named, targets)


def add_to_export(
    folder: Reference,
    adapters: References,
    *,
    base: Reference | None = None,
    read_options: ReadOptions | None = None,
    bind_options: BindOptions | None = None,
    fresh: bool = False,
    dequantize: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Add adapters to an export that has inputs for them.

    Raises:
        LoraDeployError: As ``validate``; or an adapter does not fit the graphs, or its name is taken.
    """
    multi_lora_of(Path(folder))
    checkpoint, named = _named_adapters(adapters, base, read_options, bind_options, dequantize=dequantize)
    return add_adapters(Path(folder), named, base_artifacts(checkpoint, progress), fresh=fresh)


def _named_adapters(
    adapters: References,
    base: Reference | None,
    read_options: ReadOptions | None,
    bind_options: BindOptions | None,
    *,
    dequantize: bool,
) -> tuple[Checkpoint, list[NamedAdapter]]:
    """Bind every adapter to the base by itself."""
    options = bind_options or BindOptions()
    references = [named_reference(adapter) for adapter in several(adapters)]
    read = [read_named(path, read_options) for _, path in references]
    if base is None and not read:
        raise RecipeError("--multi-lora without --adapter: nothing names the base", hint="pass --base")
    checkpoint = open_base(fspath(base) if base is not None else named_base(read), dequantize=dequantize)
    if options.weights and len(options.weights) != len(read):
        raise RecipeError(f"found {len(options.weights)} weights for {len(read)} adapters")
    named = []
    for k, ((name, _), adapter) in enumerate(zip(references, read, strict=True)):
        own = replace(options, weights=options.weights[k : k + 1])
        named.append(NamedAdapter(name=name or adapter.name, binding=bind([adapter], checkpoint, own)))
    return checkpoint, named


def check_graph_fit(
    adapter: Reference,
    graph: Reference,
    *,
    read_options: ReadOptions | None = None,
    bind_options: BindOptions | None = None,
) -> Fit:
    """Check that an adapter, or a file of onnxruntime's, fits graphs with inputs for adapters.

    Raises:
        IncompatibleAdapterError: It does not; every misfit is in ``findings``.
        InputError: A file is not what it claims to be.
    """
    found = open_switchable(Path(graph))
    if Path(adapter).suffix == ADAPTER_SUFFIX:
        return check_file(Path(adapter), found)
    return check_fit(read_named(adapter, read_options), found, bind_options)


def answer_prompt(
    folder: Reference,
    prompt: str,
    *,
    max_tokens: int = 128,
    is_raw: bool = False,
    adapter: str | None = None,
    say: Callable[[str], None] | None = None,
) -> Answer:
    """Let the graphs in a folder, or in its folder ``onnx``, answer; ``say`` hears the text as it comes.

    ``adapter`` is one that the folder has under this name.

    Raises:
        InputError: There is no export.
        ExportError: It is no decoder with a tokenizer.
    """
    root = Path(folder)
    inner = root / "onnx"
    root = inner if not (root / EXPORT_RECORD).is_file() and (inner / EXPORT_RECORD).is_file() else root
    return answer(root, prompt, max_tokens=max_tokens, is_raw=is_raw, adapter=adapter, say=say)


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
    if public_key is not None:
        check_signature(root, public_key)
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


def release(
    folder: Reference | None = None,
    *,
    output: Reference | None = None,
    graphs: Sequence[Reference] = (),
    options: ReleaseOptions | None = None,
    progress: Progress | None = None,
) -> Release:
    """Put a merged folder, its graphs and its evidence together as a release; without a folder, the current one.

    ``graphs`` defaults to the exports inside the folder, ``output`` to ``<folder>-release``.

    Raises:
        ReleaseError: A check failed, a file is not the recorded one, or the licence is unclear.
        InconclusiveError: A check is missing or cannot tell, and nobody accepted that.
        OutputExistsError: Something else is at the output.
    """
    root = merged_folder(folder)
    chosen = tuple(Path(graph) for graph in graphs) or default_graphs(root)
    out = Path(output) if output is not None else default_release(root)
    return assemble(root, out, options or ReleaseOptions(), graphs=chosen, progress=progress)


def default_release(merged: Path) -> Path:
    """Name the folder that a release goes to when nobody says: beside the merged one."""
    root = merged.resolve()
    return root.with_name(f"{root.name.removesuffix('-merged')}-release")


def push(
    folder: Reference | None,
    target: str,
    *,
    options: PushOptions | None = None,
    progress: Progress | None = None,
) -> Receipt:
    """Publish the release in a folder, all or nothing; without a folder, the current one.

    Raises:
        ReleaseError: The folder is not what its manifest says.
        PushError: The target did not take it, and is as it was.
    """
    return publish_release(_release_folder(folder), target, options or PushOptions(), progress)


def preview_push(folder: Reference | None, target: str, *, options: PushOptions | None = None) -> Preview:
    """Say what a push would send; nothing is changed anywhere.

    Raises:
        LoraDeployError: As ``push``.
    """
    return preview(_release_folder(folder), target, options or PushOptions())


def pull(
    target: str, folder: Reference, *, options: PushOptions | None = None, progress: Progress | None = None
) -> Manifest:
    """Fetch a release from a target into a folder that does not exist, checking every digest.

    Raises:
        ReleaseError: What is there is not what its manifest says.
        PushError: The target does not give it.
        OutputExistsError: Something is in the way.
    """
    return fetch_release(target, Path(folder), options or PushOptions(), progress)


def _release_folder(folder: Reference | None) -> Path:
    root = Path(folder) if folder is not None else Path()
    if folder is None and not (root / MANIFEST_NAME).is_file():
        raise RecipeError(f"the current folder holds no {MANIFEST_NAME}", hint="name the release")
    return root


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
        planned = _recorded_plan(origin, several(adapters), base, options, progress)
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


def default_output(planned: MergePlan) -> Path:
    """Name the folder that a merge goes to when nobody says: ``<adapter-name>-merged``, here."""
    return Path("+".join(adapter.name for adapter in planned.binding.adapters) + "-merged")


def _recorded_plan(
    record: MergeRecord | RecordedOrigin,
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
    checkpoint = _recorded_base(record.base, variant) if base is None else _open(fspath(base), variant=variant)
    files = base_artifacts(checkpoint, progress)
    _check_digests(
        "base",
        {str(checkpoint.root / file.path): file.sha256 for file in files},
        [file.sha256 for file in record.base.files],
    )
    binding = bind(read, checkpoint, bind_options)
    return plan_binding(binding, read_options=read_options, merge_options=replace(options, **record.options["merge"]))


def _promises_bytes(record: MergeRecord | RecordedOrigin, planned: MergePlan) -> bool:
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
