"""``adapter_config.json`` checked against what PEFT writes: no wrong type, and no key ignored in silence.

Promise: a key that is not PEFT's is refused unless its value switches nothing on: it may name a variant that changes
the formula.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from lora_deploy.errors import MalformedAdapterError, UnmergeableAdapterError

_LAST_KNOWN = (0, 21, 2)

Number = int | float


class Configuration(BaseModel):
    """What every kind of PEFT adapter says about itself."""

    model_config = ConfigDict(frozen=True, extra="allow", arbitrary_types_allowed=True)

    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None

    @property
    def version(self) -> tuple[int, ...] | None:
        """Release that wrote the file; None before 0.18, which did not say."""
        found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", self.peft_version or "")
        return tuple(int(part or 0) for part in found.groups()) if found else None

    @property
    def is_newer_than_known(self) -> bool:
        """Whether a release after the last one that these readers were checked with wrote the file."""
        return (self.version or (0,)) > _LAST_KNOWN


C = TypeVar("C", bound=Configuration)


def parse(kind: type[C], config: Mapping[str, Any], path: Path, *, is_harmless: Callable[[str], bool]) -> C:
    """Check the configuration's types and that no key is unknown but those that are known to change nothing.

    Raises:
        MalformedAdapterError: A value has the wrong type or range.
        UnmergeableAdapterError: A key that peft <= 0.21.2 does not have is switched on.
    """
    try:
        parsed = kind.model_validate(config)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        raise MalformedAdapterError(f"{path}: {'; '.join(faults[:3]).lower()}") from error
    unknown = {
        key: value
        for key, value in (parsed.model_extra or {}).items()
        if value not in (None, False, "", [], {}) and not is_harmless(key)
    }
    if unknown:
        listed = ", ".join(f"{key}={value!r}" for key, value in sorted(unknown.items()))
        raise UnmergeableAdapterError(
            f"{path}: found {listed}, unknown to peft <= 0.21.2: it may name a variant that changes the formula",
            hint="remove the key if it is known to change nothing",
        )
    return parsed
