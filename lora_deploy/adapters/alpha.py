"""Alpha of a file that has no configuration: from its header, else from the user, never guessed."""

from __future__ import annotations

import math
from collections.abc import Iterable

from lora_deploy.adapters.interface import AdapterFile
from lora_deploy.errors import MalformedAdapterError

_NAMES = ("lora_alpha", "alpha")


def metadata_alpha(file: AdapterFile) -> tuple[str, float] | None:
    """Give name and value of alpha in the safetensors header, or None.

    Raises:
        MalformedAdapterError: It is there and no finite number.
    """
    for name in _NAMES:
        text = file.metadata.get(name)
        if text is None:
            continue
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise MalformedAdapterError(f"{file.path}: metadata {name}: found {text!r}, expected a number")
        return name, value
    return None


def missing_alpha(file: AdapterFile, ranks: Iterable[int]) -> MalformedAdapterError:
    """Make the error that shows what the user may choose, given the ranks in the file."""
    found = sorted(set(ranks))
    listed = ", ".join(map(str, found))
    rank = found[-1] if found else 8
    return MalformedAdapterError(
        f"{file.path}: no adapter_config.json beside it and no alpha in its header: "
        f"the scale alpha / r is unknown, r is {listed or 'unknown'}",
        hint=f"give the alpha it was trained with: --alpha {rank} is scale 1, --alpha {2 * rank} is scale 2"
        + (f" (at r {rank})" if len(found) > 1 else ""),
        code="alpha-unknown",
    )
