"""Compare a merged folder's ``config.json`` with the planned one.

Ours must be the planned one, entry by entry. Others rewrite the file; there, the edits that the merge depends on must
be in it: sharing of embeddings, size of the vocabulary, number of layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lora_deploy.checkpoint import Checkpoint
from lora_deploy.evidence.outcome import Outcome, TensorOutcome
from lora_deploy.merge.plan import MergePlan

_ABSENT = object()


def check_config(plan: MergePlan, merged: Checkpoint, *, is_ours: bool) -> Iterator[TensorOutcome]:
    """List the entries that contradict the plan."""
    paths = sorted({*plan.config, *merged.config}) if is_ours else list(plan.binding.config_edits)
    for path in paths:
        found, expected = _entry(merged.config, path), _entry(plan.config, path)
        if found != expected:
            yield TensorOutcome(
                name=f"config.json:{path}",
                outcome=Outcome.WRONG_CONFIG,
                message=f"found {_shown(found)}, expected {_shown(expected)}",
            )


def _entry(config: Mapping[str, Any], path: str) -> object:
    if path in config:
        return config[path]
    head, _, rest = path.partition(".")
    inner = config.get(head)
    return _entry(inner, rest) if rest and isinstance(inner, Mapping) else _ABSENT


def _shown(value: object) -> str:
    return "no such entry" if value is _ABSENT else repr(value)
