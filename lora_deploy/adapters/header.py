"""The configuration that diffusers writes into a safetensors header: of one adapter, or of a pipeline's components."""

from __future__ import annotations

import json
from typing import Any

from lora_deploy.adapters.interface import AdapterFile
from lora_deploy.errors import MalformedAdapterError

CONFIGURATION = "lora_adapter_metadata"


def header_configuration(file: AdapterFile) -> dict[str, Any] | None:
    """Give it as it was written, or None.

    Raises:
        MalformedAdapterError: It is there and no JSON object.
    """
    text = file.metadata.get(CONFIGURATION)
    if text is None:
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MalformedAdapterError(f"{file.path}: metadata {CONFIGURATION} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise MalformedAdapterError(f"{file.path}: metadata {CONFIGURATION} is not a JSON object")
    return found


def by_component(configuration: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Part a pipeline's, whose keys stand behind the name of their component: ``unet.r``."""
    parts: dict[str, dict[str, Any]] = {}
    for key, value in configuration.items():
        component, _, field = key.partition(".")
        parts.setdefault(component, {})[field] = value
    return parts
