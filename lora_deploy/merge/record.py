"""The merge record, ``merge.json``: what was merged from what, with which options, and what every tensor became.

Promise: canonical JSON, a schema version, digests of every input and of every output file; enough to replay the merge.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from lora_deploy.checkpoint import read_json
from lora_deploy.errors import InputError, RecipeError

RECORD_NAME = "merge.json"
SCHEMA: Literal[1] = 1


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _contained(path: str) -> str:
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or not pure.parts:
        raise ValueError(f"{path!r} leads out of the folder")
    return path


class RecordedFile(_Frozen):
    """A file by path, size and digest."""

    path: Annotated[str, AfterValidator(_contained)]
    """Relative to its folder, and inside it."""
    n_bytes: int
    sha256: str


class RecordedBase(_Frozen):
    """The base that was merged into."""

    name: str
    revision: str | None
    root: str
    """Folder it was read from."""
    files: tuple[RecordedFile, ...]
    """Weight files and ``config.json``."""


class RecordedAdapter(_Frozen):
    """One adapter, in the order of application."""

    name: str
    path: str
    format: str
    sha256: str
    config_sha256: str | None
    base_name: str | None
    base_revision: str | None
    weight: float


class RecordedFinding(_Frozen):
    """A finding of binding or planning."""

    code: str
    severity: str
    target: str
    message: str


class RecordedOrigin(_Frozen):
    """What was merged and how, as far as it takes to plan the same merge again: a part of ``MergeRecord``."""

    versions: dict[str, str]
    base: RecordedBase
    adapters: tuple[RecordedAdapter, ...]
    options: dict[str, Any]
    """``read``, ``bind`` and ``merge`` options that decide the bytes."""
    findings: tuple[RecordedFinding, ...] = ()
    """Of binding and planning; older records have none."""


class RecordedUpdate(_Frozen):
    """One update of a tensor."""

    kind: str
    adapter: int
    """Position of its adapter, from 0."""
    keys: tuple[str, ...]
    rank: int | None = None
    scale: float | None = None
    """The float64 that the merge is defined with."""
    scale_source: str | None = None


class RecordedTensor(_Frozen):
    """What one changed, cast or added tensor became."""

    treatment: str
    dtype: str
    shape: tuple[int, ...]
    source: str | None
    updates: tuple[RecordedUpdate, ...] = ()
    max_abs: float
    """Largest finite |W'| as stored."""
    delta_norm: float | None = None
    """‖Δ‖, Frobenius."""
    weight_norm: float | None = None
    """‖W‖, Frobenius, of the weights before the update."""
    survival: float | None = None
    """1 - ‖stored - exact‖ / ‖Δ‖: the part of the update that the output dtype kept, at most 1."""
    n_underflowed: int = 0
    """Elements that were not zero and are stored as zero."""

    @property
    def ratio(self) -> float | None:
        """‖Δ‖ / ‖W‖."""
        return self.delta_norm / self.weight_norm if self.delta_norm is not None and self.weight_norm else None


class RecordedCost(_Frozen):
    """What the merge took on the machine that made it; no part of any digest."""

    seconds: float
    peak_private_bytes: int
    planned_peak_bytes: int
    n_workers: int
    device: str


class MergeRecord(_Frozen):
    """The whole record."""

    schema_version: Literal[1] = Field(SCHEMA, alias="schema")
    digest: str
    """Of the inputs and options that decide the bytes."""
    versions: dict[str, str]
    base: RecordedBase
    adapters: tuple[RecordedAdapter, ...]
    options: dict[str, Any]
    """``read``, ``bind`` and ``merge`` options that decide the bytes."""
    config_edits: dict[str, Any]
    excluded: tuple[str, ...]
    findings: tuple[RecordedFinding, ...]
    artifacts: tuple[RecordedFile, ...]
    """Every file of the folder but this one."""
    tensors: dict[str, RecordedTensor]
    """Every tensor that is not a byte copy of the base's."""
    n_untouched: int
    cost: RecordedCost

    def text(self) -> str:
        """The file's content: sorted keys, two spaces, one final newline."""
        return self.model_dump_json(indent=2, by_alias=True) + "\n"


def read_record(folder: Path) -> MergeRecord:
    """Read the merge record of a folder.

    Raises:
        InputError: There is none, or it is not one of ours.
    """
    path = folder / RECORD_NAME
    if not path.is_file():
        raise InputError(f"{folder}: has no {RECORD_NAME}", hint="pass --adapter and --base, or the folder of a merge")
    try:
        return MergeRecord.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{path}: {where}: {first['msg']}", hint="written by another version?") from error


def merged_folder(folder: str | PathLike[str] | None, *others: str) -> Path:
    """Find the folder that is meant: without one, the current folder if it holds our record, or one of ``others``.

    Raises:
        RecipeError: No folder is named, and the current one holds no record.
        InputError: There is no such folder.
    """
    root = Path(folder) if folder is not None else Path()
    if folder is None and not any((root / name).is_file() for name in (RECORD_NAME, *others)):
        raise RecipeError(f"the current folder holds no {RECORD_NAME}", hint="name the merged folder")
    if not root.is_dir():
        raise InputError(f"{root}: no such folder")
    return root
