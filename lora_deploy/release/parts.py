"""Everything that a release is made of, found and read before anything is written.

A merged folder is released with its graphs; an export straight from base and adapters is released as it is, and its
origin stands where the merge record would.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lora_deploy.errors import InputError, RecipeError
from lora_deploy.export.record import RECORD_NAME as EXPORT_RECORD
from lora_deploy.export.record import ExportRecord
from lora_deploy.export.record import read_record as read_export
from lora_deploy.merge.record import RECORD_NAME, MergeRecord, RecordedFinding, RecordedOrigin, read_record
from lora_deploy.release.gate import Passage, pass_gate, read_evidence
from lora_deploy.release.licence import Licence, licence_of
from lora_deploy.release.options import ReleaseOptions

ITSELF = "."
"""Folder of an export that is the release."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Parts:
    """What a release is made of."""

    root: Path
    record: MergeRecord | RecordedOrigin
    exports: Mapping[str, tuple[Path, ExportRecord]]
    """By folder in the release."""
    passage: Passage
    licence: Licence

    @property
    def findings(self) -> tuple[RecordedFinding, ...]:
        """What was noticed by any stage, once."""
        licence = [
            RecordedFinding(code=f.code, severity=f.severity.value, target=f.target, message=f.message)
            for f in self.licence.findings
        ]
        found = (*self.record.findings, *(f for _, export in self.exports.values() for f in export.findings), *licence)
        return tuple(dict.fromkeys(found))


def gather(root: Path, graphs: Sequence[Path], options: ReleaseOptions) -> Parts:
    """Read the records of a folder and its graphs, and pass the gate.

    Raises:
        ReleaseError: A check failed, or the licence is unclear.
        InconclusiveError: A check is missing, and nobody accepted that.
        InputError: Nothing says what the folder was made from.
        RecipeError: Two folders of graphs have one name.
    """
    exports: dict[str, tuple[Path, ExportRecord]] = {}
    record: MergeRecord | RecordedOrigin
    if is_direct(root):
        if graphs:
            raise RecipeError(
                f"--onnx {graphs[0]}: {root} is an export itself, and released alone",
                hint="merge, and export from the merged folder, to release several together",
            )
        export = read_export(root)
        record = _origin(root, export)
        exports[ITSELF] = (root, export)
    else:
        record = read_record(root)
    for folder in graphs:
        name = folder.resolve().name
        if name in exports:
            raise RecipeError(f"--onnx {folder}: two folders are called {name}")
        exports[name] = (folder, read_export(folder))
    merged = {file.path: file.sha256 for file in record.artifacts} if isinstance(record, MergeRecord) else {}
    exported = {
        inside(name, file.path): file.sha256 for name, (_, export) in exports.items() for file in export.artifacts
    }
    taken = sorted(merged.keys() & exported.keys())
    if taken:
        raise RecipeError(f"{taken[0]}: is a file of the merged folder and of an export", hint="rename the export")
    has_graphs = bool(exports) or any(path.endswith(".onnx") for path in merged)
    passage = pass_gate(read_evidence(root), merged | exported, options.accepted, has_graphs=has_graphs)
    adapters = [Path(adapter.path).parent for adapter in record.adapters]
    licence = licence_of(Path(record.base.root), adapters, options.license)
    return Parts(root=root, record=record, exports=exports, passage=passage, licence=licence)


def default_graphs(root: Path) -> tuple[Path, ...]:
    """Find the exports inside a merged folder."""
    if is_direct(root):
        return ()
    return tuple(sorted(path.parent for path in root.glob(f"*/{EXPORT_RECORD}")))


def inside(folder: str, path: str) -> str:
    """Name a file of an export in the release."""
    return str(PurePosixPath(folder) / path)


def is_direct(root: Path) -> bool:
    """Whether a folder is an export straight from base and adapters."""
    return (root / EXPORT_RECORD).is_file() and not (root / RECORD_NAME).is_file()


def _origin(root: Path, export: ExportRecord) -> RecordedOrigin:
    """Read from what an export was made.

    Raises:
        InputError: It does not say, or from no adapter.
    """
    if export.origin is None:
        raise InputError(
            f"{root}: is an export of a merged folder", hint="release that folder, with --onnx for these graphs"
        )
    if not export.origin.adapters:
        raise InputError(
            f"{root}: holds no merged adapter: adapters are switched at run time",
            hint="release what lora-deploy merge, or export --adapter without --multi-lora, made",
        )
    return export.origin
