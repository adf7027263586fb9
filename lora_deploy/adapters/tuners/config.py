"""What tuners' ``adapter_config.json`` have in common: every field of peft <= 0.21.2 checked, none ignored unsaid."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from lora_deploy.adapters.configuration import Configuration, parse


class TunerConfig(Configuration):
    """Fields of every tuner."""

    peft_type: str
    target_modules: tuple[str, ...] | str | None = None
    exclude_modules: tuple[str, ...] | str | None = None
    layers_to_transform: tuple[int, ...] | int | None = None
    layers_pattern: tuple[str, ...] | str | None = None
    modules_to_save: tuple[str, ...] | None = None
    bias: str = "none"

    # No effect on the merged values, or none that the tensors do not show.
    task_type: Any = None
    auto_mapping: Any = None
    inference_mode: Any = None
    fan_in_fan_out: Any = None
    init_weights: Any = None
    runtime_config: Any = None


C = TypeVar("C", bound=TunerConfig)


def parse_config(kind: type[C], config: Mapping[str, Any], path: Path) -> C:
    """Check the configuration's types and that no key is unknown.

    Raises:
        MalformedAdapterError: A value has the wrong type or range.
        UnmergeableAdapterError: A key that peft <= 0.21.2 does not have is switched on.
    """
    return parse(kind, config, path, is_harmless=lambda key: key.endswith("dropout"))
