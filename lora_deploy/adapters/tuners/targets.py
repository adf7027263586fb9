"""Which modules a configuration means, for tuners whose files do not name theirs.

Source: peft 0.21.2, ``tuners/tuners_utils.py``, ``check_target_module_exists``.
"""

from __future__ import annotations

import re

from lora_deploy.adapters.tuners.config import TunerConfig


def is_target(config: TunerConfig, path: str) -> bool:
    """Whether the configuration means the module of this path."""
    if _names(config.exclude_modules, path):
        return False
    if any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in config.modules_to_save or ()):
        return False
    if not _names(config.target_modules, path):
        return False
    layers = config.layers_to_transform
    if layers is None or layers == () or isinstance(config.target_modules, str):
        return True
    if isinstance(config.target_modules, tuple) and path in config.target_modules:
        return True
    patterns = config.layers_pattern or ()
    patterns = (patterns,) if isinstance(patterns, str) else patterns
    forms = [rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(?P<index>\d+)\."]
    found = next((match for form in forms if (match := re.match(form, path))), None)
    return found is not None and int(found["index"]) in ((layers,) if isinstance(layers, int) else layers)


def _names(names: tuple[str, ...] | str | None, path: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names or ())
