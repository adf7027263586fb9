"""The user's own prompts for a pipeline: a JSON line each, ``{"prompt": "…"}``."""

from __future__ import annotations

from pathlib import Path

from lora_deploy.errors import InputError
from lora_deploy.evidence.user_probe import lines_of


def read_prompts(path: Path) -> tuple[str, ...]:
    """Read them.

    Raises:
        InputError: A line is none; the message has its number.
    """
    found = []
    for number, entry in lines_of(path):
        prompt = entry.get("prompt")
        if not isinstance(prompt, str) or not prompt:
            raise InputError(
                f"{path}:{number}: found {', '.join(entry) or 'nothing'}, expected prompt (a text)",
                hint='a pipeline is probed with lines like {"prompt": "a red fox"}',
            )
        found.append(prompt)
    if not found:
        raise InputError(f"{path}: holds no probe", hint='a line is {"prompt": "a red fox"}')
    return tuple(found)
