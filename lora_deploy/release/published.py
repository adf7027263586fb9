"""Records as strangers get them: inputs by name and digest, never by where they lay on this machine.

A merge record says where base and adapters were read, so that ``verify`` finds them again; published, that would name
somebody's home. The released record is the merge's own in everything else: its digest, and every digest in it.

Promise: no text of a release holds a path of this machine. What is a hub id stays one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_deploy.merge.record import MergeRecord, RecordedFinding, RecordedOrigin
from lora_deploy.release.card import public_name

_ABSOLUTE = re.compile(r"(?<![\w./:~-])/[^\s/'\"`,;:()\[\]{}<>|]+(?:/[^\s/'\"`,;:()\[\]{}<>|]+)+/?")
"""Two components or more: ``a/b`` is a hub id, and ``/s`` a unit."""


class Places:
    """Paths of this machine, and what they are called elsewhere."""

    def __init__(self, record: MergeRecord | RecordedOrigin, merged: Path) -> None:
        """Name what a record names by path; the merged folder is ``.``."""
        base = record.base
        names = {base.root: public_name(record), base.name: public_name(record), str(merged.resolve()): "."}
        for adapter in record.adapters:
            path = Path(adapter.path)
            names |= {str(path.parent): adapter.name, adapter.path: f"{adapter.name}/{path.name}"}
        names[str(Path.home())] = "~"
        local = {path: name for path, name in names.items() if path.startswith("/") and path != "/"}
        self._names = sorted(local.items(), key=lambda entry: -len(entry[0]))

    def text(self, text: str) -> str:
        """Call every path by its name; one that is known by no name, and is here, by its last component."""
        for path, name in self._names:
            text = re.sub(rf"{re.escape(path)}(?![\w.-])", name.replace("\\", r"\\"), text)
        return _ABSOLUTE.sub(lambda found: Path(found[0]).name if Path(found[0]).exists() else found[0], text)

    def published(self, value: Any) -> Any:  # noqa: ANN401 - JSON
        """Do so in every string of a JSON document."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {self.text(key): self.published(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.published(item) for item in value]
        return value

    def findings(self, findings: Sequence[RecordedFinding]) -> tuple[RecordedFinding, ...]:
        """Do so in findings."""
        return tuple(RecordedFinding.model_validate(self.published(finding.model_dump())) for finding in findings)


def published_record(record: MergeRecord, places: Places) -> MergeRecord:
    """Give a merge record without places."""
    document = record.model_dump(mode="json", by_alias=True)
    return MergeRecord.model_validate(places.published(document) | _unplaced(document, places))


def published_origin(origin: RecordedOrigin, places: Places) -> RecordedOrigin:
    """Give the origin of a direct export without places."""
    document = origin.model_dump(mode="json")
    return RecordedOrigin.model_validate(places.published(document) | _unplaced(document, places))


def published_export(document: Mapping[str, Any], places: Places) -> dict[str, Any]:
    """Give the JSON of an export's record, ``export.json``, without places."""
    found: dict[str, Any] = places.published(document)
    origin = document["lora_deploy"].get("origin")
    if origin is not None:
        found["lora_deploy"]["origin"] |= _unplaced(origin, places)
    return found


def _unplaced(origin: Mapping[str, Any], places: Places) -> dict[str, Any]:
    """Name base and adapters without a place: ``verify`` asks for it, or takes the hub's."""
    base = places.published(origin["base"]) | {"root": ""}
    adapters = [places.published(adapter) | {"path": adapter["name"]} for adapter in origin["adapters"]]
    return {"base": base, "adapters": adapters}
