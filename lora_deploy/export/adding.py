"""Add adapters to finished graphs that have inputs for them; graphs and weights are not touched.

Promise: the folder is then what one export with all of these adapters would have written, byte for byte, its digest
too. The adapter's file is put in place before the record names it: a kill in between leaves what it was.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lora_deploy.artifact import Artifact, cached_sha256
from lora_deploy.checkpoint import read_json
from lora_deploy.errors import InputError, OutputExistsError
from lora_deploy.export.execute import Exported
from lora_deploy.export.fitting import misfit, misfits
from lora_deploy.export.multi_lora import NamedAdapter, digest_with_adapters, require_switchable
from lora_deploy.export.record import RECORD_NAME, ExportRecord, RecordedMultiLora, read_record
from lora_deploy.merge.record import RecordedFile
from lora_deploy.safetensors_file import write_file
from lora_deploy.validate.findings import title


def multi_lora_of(folder: Path) -> tuple[ExportRecord, RecordedMultiLora]:
    """Read the record of a folder whose graphs have inputs for adapters.

    Raises:
        InputError: There is none, or its graphs have no such inputs.
    """
    record = read_record(folder)
    if record.multi_lora is None:
        raise InputError(f"{folder}: its graphs have no inputs for adapters", hint="export with --multi-lora")
    return record, record.multi_lora


def add_adapters(
    folder: Path, adapters: Sequence[NamedAdapter], base: Sequence[Artifact], *, fresh: bool = False
) -> Exported:
    """Write a file for each adapter into a multi-lora export, and name it in the record.

    ``base`` are the weight files that the adapters were bound to; ``fresh`` allows to replace an adapter of the name.

    Raises:
        InputError: The folder takes no adapters, or is an export of another base.
        IncompatibleAdapterError: An adapter changes what has no input, or is more than low-rank updates.
        OutputExistsError: There is another adapter of that name.
        ExportError, MergeError: A file cannot be written.
    """
    with _alone(folder):
        record, multi_lora = multi_lora_of(folder)
        _require_base(folder, record, base)
        require_switchable(adapters)
        for adapter in adapters:
            found = list(misfits(adapter.binding.updates, multi_lora.inputs))
            if found:
                raise misfit(title(adapter.binding.adapters[0]), folder, found)
        new = [adapter for adapter in adapters if not _is_there(folder, record, multi_lora, adapter, fresh=fresh)]
        if not new:
            return Exported(root=folder, record=record, was_done=True)
        artifacts = {file.path: file for file in record.artifacts}
        for adapter in new:
            written = adapter.write(folder, multi_lora.inputs)
            artifacts[adapter.file] = RecordedFile(path=adapter.file, n_bytes=written.n_bytes, sha256=written.sha256)
        added = {adapter.name: adapter.recorded() for adapter in new}
        multi_lora = multi_lora.model_copy(update={"adapters": {**multi_lora.adapters, **added}})
        record = record.model_copy(
            update={
                "digest": digest_with_adapters(multi_lora),
                "multi_lora": multi_lora,
                "artifacts": tuple(artifacts[path] for path in sorted(artifacts)),
            }
        )
        _rewrite(folder, record)
    return Exported(root=folder, record=record)


def _require_base(folder: Path, record: ExportRecord, base: Sequence[Artifact]) -> None:
    expected = [file["sha256"] for file in record.source["merge"]["base"]]
    found = [file.sha256 for file in base]
    if found != expected:
        raise InputError(
            f"{folder}: was exported from another base: sha256 {expected[0][:12]}…, the given one has {found[0][:12]}…",
            hint="say with --base which it was",
            code="other-base",
        )


def _is_there(
    folder: Path, record: ExportRecord, multi_lora: RecordedMultiLora, adapter: NamedAdapter, *, fresh: bool
) -> bool:
    """Whether this very adapter is in the folder, unchanged."""
    known = multi_lora.adapters.get(adapter.name)
    if known is None:
        return False
    sha256 = next((file.sha256 for file in record.artifacts if file.path == known.file), None)
    path = folder / known.file
    if known == adapter.recorded() and path.is_file() and cached_sha256(path) == sha256:
        return True
    if fresh:
        return False
    raise OutputExistsError(
        f"{path}: another adapter has this name",
        hint="choose another, --adapter NAME=PATH, or replace it with --fresh",
    )


def _rewrite(folder: Path, record: ExportRecord) -> None:
    whole = {**read_json(folder / RECORD_NAME), "lora_deploy": record.model_dump(mode="json", by_alias=True)}
    text = json.dumps(whole, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    write_file(folder / RECORD_NAME, text.encode(), (), root=folder)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder against a second process that adds to it."""
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise InputError(f"{folder}: no such folder") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
