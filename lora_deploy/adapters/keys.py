"""Names inside adapter files: wrappers that training puts around modules, and PEFT's slots.

Promise: what a wrapper adds is removed, and nothing else; two keys that become one are an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from lora_deploy.errors import MalformedAdapterError

PEFT_SLOT = re.compile(r"(^|\.)(lora_[AB]\.([^.]+\.)?(weight|bias)|lora_embedding_[AB](\.[^.]+)?)$")
"""The factors of a PEFT LoRA adapter."""

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
_DATA_PARALLEL = "module."
_PEFT_ROOT = "base_model.model."
_BUFFER = re.compile(r"(^|\.)(rotary_emb\.inv_freq|position_ids|masked_bias)$")


def unwrapped(path: Path, keys: Iterable[str]) -> dict[str, str]:
    """Map each key of a file to the module path and slot that it means in the base model.

    ``torch.compile``, FSDP and checkpointing wrappers are removed wherever they are; a leading ``module.`` and what
    stands before ``base_model.model.`` only where every key that could has it.

    Raises:
        MalformedAdapterError: Two keys mean the same.
    """
    names = {key: _WRAPPERS.sub("", key) for key in keys}
    if all(name.startswith(_DATA_PARALLEL) for name in names.values()):
        names = {key: name.removeprefix(_DATA_PARALLEL) for key, name in names.items()}
    leads = {name.partition(_PEFT_ROOT)[0] for name in names.values() if _PEFT_ROOT in name}
    if len(leads) == 1:
        root = leads.pop() + _PEFT_ROOT
        names = {key: name.removeprefix(root) for key, name in names.items()}
    seen: dict[str, str] = {}
    for key, name in names.items():
        if name in seen:
            raise MalformedAdapterError(f"{path}: {seen[name]} and {key} both mean {name}")
        seen[name] = key
    return names


def is_computed_buffer(name: str) -> bool:
    """Whether a tensor is one that models compute themselves and old files hold (rotary tables, position ids)."""
    return _BUFFER.search(name) is not None
