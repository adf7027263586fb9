"""What a tuner of PEFT other than LORA is to the reader: names of its tensors, its configuration, how to read both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_deploy.adapter import ModelWide, ModuleUpdate
from lora_deploy.adapters.adapted import Adapted
from lora_deploy.adapters.tuners.config import TunerConfig


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reading:
    """What a tuner's tensors are."""

    updates: Iterable[ModuleUpdate]
    model_wide: ModelWide | None = None
    notes: tuple[str, ...] = ()
    """What is worth knowing, such as with which library something was drawn again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuner:
    """One tuner."""

    peft_type: str
    config: type[TunerConfig]
    slots: tuple[tuple[str, str], ...]
    """Names of a module's tensors, as regular expressions: an attribute, and what comes behind the adapter's name."""
    read: Callable[[Sequence[Adapted], Any], Reading]
    """Reads all modules of a file with its parsed configuration. Raises ``MalformedAdapterError`` and
    ``UnmergeableAdapterError``."""
    shared: tuple[tuple[str, str], ...] = ()
    """The same for tensors that belong to no module."""
    copies: Mapping[tuple[str, str], str] = field(default_factory=dict)
    """The same for tensors of a module that are not needed, with the reason."""
