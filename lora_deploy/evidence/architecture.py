"""Which class a checkpoint's configuration names, and what that class wants to be fed. Nothing is loaded.

Promise: only classes of transformers itself are built; code that a checkpoint brings along is never run.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

_CLASSIFIERS = ("ForSequenceClassification", "ForQuestionAnswering", "ForTokenClassification")
INSTALL_HINT = "install the extra: pip install 'lora-deploy[export]'"


@dataclass(frozen=True, slots=True, kw_only=True)
class Absence:
    """Why there is no model to run."""

    reason: str
    is_applicable: bool
    """Whether there would be one if something were installed or chosen otherwise."""
    hint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A class of transformers that a configuration names."""

    name: str
    """Such as ``LlamaForCausalLM``."""
    main_input: str
    """``input_ids``, ``pixel_values``, ``input_features`` or ``input_values``."""
    arguments: frozenset[str]
    """Names that its forward pass takes."""
    is_decoder: bool
    """Whether it continues a text from left to right: padded on the left, with positions and a cache."""
    is_encoder_decoder: bool
    """Whether its decoder, besides, takes a text of its own."""

    @property
    def answers(self) -> bool:
        """Whether that text is an answer, which grows token by token; classifiers make theirs of their input."""
        return self.is_encoder_decoder and not self.name.endswith(_CLASSIFIERS)


def find_architecture(config: Mapping[str, Any]) -> Architecture | Absence:
    """Find the class that ``config.json`` names."""
    names = [str(name) for name in config.get("architectures") or ()]
    if not names or "model_type" not in config:
        return Absence(reason="config.json names no architecture, so there is no model to run", is_applicable=False)
    missing = missing_packages()
    if missing:
        reason = f"{' and '.join(missing)} not installed: no model can be run"
        return Absence(reason=reason, is_applicable=True, hint=INSTALL_HINT)
    import transformers

    cls = getattr(transformers, names[0], None)
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
        reason = f"transformers {transformers.__version__} has no architecture {names[0]}, so there is no model to run"
        return Absence(reason=reason, is_applicable=False)
    arguments = frozenset(inspect.signature(cls.forward).parameters)
    is_encoder_decoder = "decoder_input_ids" in arguments
    return Architecture(
        name=names[0],
        main_input=str(cls.main_input_name),
        arguments=arguments,
        is_decoder=names[0].endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))
        and not is_encoder_decoder
        and "input_ids" in arguments,
        is_encoder_decoder=is_encoder_decoder,
    )


def missing_packages(*names: str) -> list[str]:
    """List which optional packages are not installed; by default those that every model needs."""
    return [name for name in names or ("transformers",) if find_spec(name) is None]
