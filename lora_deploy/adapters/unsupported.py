"""Kinds of adapters that PEFT names and that are never merged, with the reason.

Promise: such a file is refused by the name of its kind, never read as another.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_deploy.adapters.interface import AdapterFile
from lora_deploy.adapters.peft.config import SERVE_UNMERGED
from lora_deploy.adapters.tuners import TUNERS
from lora_deploy.errors import UnknownAdapterFormatError, UnmergeableAdapterError

PEFT_NEVER = {
    "ADAMSS": "its scatter indices are not in the file",
    "ADAPTION_PROMPT": "it adds attention over trained prompts",
    "CARTRIDGE": "it is a trained key-value cache",
    "CPT": "it adds virtual tokens",
    "LILY": "its routing depends on the input",
    "MULTITASK_PROMPT_TUNING": "it adds virtual tokens",
    "POLY": "its routing depends on the task",
    "PREFIX_TUNING": "it adds a trained key-value prefix",
    "PROMPT_TUNING": "it adds virtual tokens",
    "P_TUNING": "it adds virtual tokens",
    "SHADOW": "it is a network beside the model",
    "XLORA": "its gate depends on the input",
}
"""``peft_type`` values that no weights can express, and why."""


def refuse_format(file: AdapterFile) -> None:
    """Refuse a file whose configuration names a kind that is not merged.

    Raises:
        UnknownAdapterFormatError: A ``peft_type`` that PEFT does not have.
        UnmergeableAdapterError: A ``peft_type`` that no weights can express.
    """
    if file.config is not None:
        refuse_configuration(file.path, file.config)


def refuse_configuration(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse the configuration of another format, and every ``peft_type`` but LORA, with the reason.

    Raises:
        UnknownAdapterFormatError: Not PEFT's.
        UnmergeableAdapterError: No weights can express it.
    """
    peft_type = config.get("peft_type")
    if peft_type is None:
        return
    peft_type = str(peft_type)
    if peft_type in PEFT_NEVER:
        raise UnmergeableAdapterError(
            f"{path}: PEFT {peft_type} cannot be merged: {PEFT_NEVER[peft_type]}",
            hint=SERVE_UNMERGED,
        )
    if peft_type != "LORA" and peft_type not in {entry.name for entry in TUNERS}:
        raise UnknownAdapterFormatError(f"{path}: peft_type {peft_type!r} is none of peft <= 0.21.2")
