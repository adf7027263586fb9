"""By what torchtune's files are known, its own and those that it writes under PEFT's names.

An export looks like PEFT's folder; what gives it away is a configuration of the four fields that torchtune writes, and
either magnitudes, which PEFT never writes without ``use_dora``, or torchtune's own file beside it.
Source: torchtune 0.6.1, ``training/checkpointing/_checkpointer.py`` and ``models/convert_weights.py``.
"""

from __future__ import annotations

from lora_deploy.adapters.interface import AdapterFile
from lora_deploy.adapters.keys import PEFT_SLOT

OWN_NAME = "adapter_model.pt"
"""torchtune's own file."""
_WRITTEN = frozenset({"r", "lora_alpha", "target_modules", "peft_type", "base_model_name_or_path"})
_MAGNITUDE = ".lora_magnitude_vector"


def is_own(file: AdapterFile) -> bool:
    """Whether the keys are torchtune's own."""
    return any(key.endswith(".lora_a.weight") for key in file.tensors)


def is_export(file: AdapterFile) -> bool:
    """Whether this is torchtune's rendering of an adapter as PEFT's."""
    if not has_exports_configuration(file) or not any(PEFT_SLOT.search(key) for key in file.tensors):
        return False
    beside = file.path.parent / OWN_NAME
    return holds_magnitudes(file) or (beside.is_file() and beside != file.path)


def has_exports_configuration(file: AdapterFile) -> bool:
    """Whether the configuration has the fields that torchtune writes, and none of the many that PEFT adds."""
    return file.config is not None and {"r", "lora_alpha", "target_modules"} <= set(file.config) <= _WRITTEN


def holds_magnitudes(file: AdapterFile) -> bool:
    """Whether it is DoRA, which the configuration of an export does not say."""
    return any(key.endswith(_MAGNITUDE) for key in file.tensors)
