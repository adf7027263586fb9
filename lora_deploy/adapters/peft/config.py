"""``adapter_config.json`` of a PEFT LORA adapter: every field of peft <= 0.21.2, checked, and none ignored in silence.

Promise: a key that is not PEFT's is refused unless its value switches nothing on: it may name a variant that changes
the formula. What cannot be merged, or not onto the original base, is refused with its reason.
Source: peft 0.21.2, ``tuners/lora/config.py``; peft 0.2.0 for ``enable_lora`` and ``merge_weights``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from lora_deploy.adapters.configuration import Configuration, Number, parse
from lora_deploy.errors import MalformedAdapterError, UnmergeableAdapterError

_TRAINING_ONLY = frozenset({"lora_plus_lr_ratio", "lorap_lr_ratio", "lorap_emb_lr", "lora_dtype"})
"""Keys that other trainers add (LoRA+ learning rates, the dtype of the factors): they change no formula."""

SERVE_UNMERGED = "it can be served unmerged only: load it with PEFT beside its base"
_CONVERSION = "save_pretrained(…, path_initial_model_for_weight_conversion=…)"
"""PEFT's way to write such an adapter for the original base."""
_INITS_ON_ORIGINAL_BASE = frozenset({"gaussian", "orthogonal", "mica", "eva"})


class BlockDiagonal(BaseModel):
    """``use_bdlora``: which modules have a block-diagonal factor. Source: peft 0.21.2, ``BdLoraConfig``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    target_modules_bd_a: tuple[str, ...] | None = None
    target_modules_bd_b: tuple[str, ...] | None = None
    nblocks: int = Field(default=1, gt=0)
    match_strict: bool = True


class PeftConfig(Configuration):
    """The configuration of one LORA adapter, defaults as in PEFT."""

    # What the merge depends on.
    peft_type: Literal["LORA"] = "LORA"
    r: int = Field(default=8, gt=0)
    lora_alpha: Number = Field(default=8, allow_inf_nan=False)
    use_rslora: bool = False
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    alpha_pattern: dict[str, Number] = Field(default_factory=dict)
    use_dora: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    lora_bias: bool = False
    modules_to_save: tuple[str, ...] | None = None
    trainable_token_indices: tuple[int, ...] | dict[str, tuple[int, ...]] | None = None
    target_parameters: tuple[str, ...] | None = None
    layer_replication: tuple[tuple[int, int], ...] | None = None
    init_lora_weights: bool | str | None = True
    kasa_config: dict[str, Any] | None = None
    use_bdlora: BlockDiagonal | None = None
    enable_lora: tuple[bool, ...] | None = None
    """peft <= 0.2: the equal parts of a merged linear layer that are adapted."""

    # What makes it unmergeable.
    use_qalora: bool = False
    arrow_config: dict[str, Any] | None = None
    alora_invocation_tokens: tuple[int, ...] | None = None

    # What has no effect on the merged values, or none that its tensors do not show.
    task_type: Any = None
    auto_mapping: Any = None
    inference_mode: Any = None
    target_modules: Any = None
    exclude_modules: Any = None
    lora_dropout: Any = None
    fan_in_fan_out: Any = None
    layers_to_transform: Any = None
    layers_pattern: Any = None
    megatron_config: Any = None
    megatron_core: Any = None
    loftq_config: Any = None
    eva_config: Any = None
    corda_config: Any = None
    lora_ga_config: Any = None
    velora_config: Any = None
    monteclora_config: Any = None
    qalora_group_size: Any = None
    runtime_config: Any = None
    ensure_weight_tying: Any = None
    merge_weights: Any = None

    @field_validator("rank_pattern", "alpha_pattern", mode="before")
    @classmethod
    def _empty_for_null(cls, value: object) -> object:
        return {} if value is None else value

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _compilable(cls, value: dict[str, Any]) -> dict[str, Any]:
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        return value

    @property
    def residual_method(self) -> Literal["pissa", "olora"] | None:
        """How training changed the base before it started, where that can be recomputed from the base."""
        init = str(self.init_lora_weights).lower()
        return "pissa" if init == "pissa" else "olora" if init == "olora" else None

    def adapts_parameters_of(self, module: str) -> tuple[str, ...]:
        """Names of the parameters of a module that ``target_parameters`` may adapt, in its order."""
        names = []
        for target in self.target_parameters or ():
            owner, _, name = target.rpartition(".")
            if not owner or _is_or_ends_with(module, owner):
                names.append(name)
        return tuple(dict.fromkeys(names))

    def names_parameters_of(self, module: str) -> bool:
        """Whether ``target_parameters`` names this module, rather than parameters of any module."""
        owners = (target.rpartition(".")[0] for target in self.target_parameters or ())
        return any(owner and _is_or_ends_with(module, owner) for owner in owners)


def _is_or_ends_with(module: str, owner: str) -> bool:
    return module == owner or module.endswith(f".{owner}")


def parse_config(config: Mapping[str, Any], path: Path) -> PeftConfig:
    """Check the configuration's types and that no key is unknown.

    Raises:
        MalformedAdapterError: A value has the wrong type or range, or this is not a PEFT configuration.
        UnmergeableAdapterError: A key that peft <= 0.21.2 does not have is switched on.
    """
    if config.get("peft_type") is None and "lora_alpha" not in config:
        raise MalformedAdapterError(
            f"{path}: not a PEFT configuration: neither peft_type nor lora_alpha",
            hint="move it away and give --alpha if the tensors beside it are PEFT's",
        )
    return parse(PeftConfig, {**config, "peft_type": "LORA"}, path, is_harmless=_TRAINING_ONLY.__contains__)


def refuse_unmergeable(config: PeftConfig, path: Path, *, base_is_residual: bool) -> None:
    """Refuse what no weights can express, and what only the base that training wrote can complete.

    Raises:
        UnmergeableAdapterError: With the reason.
        MalformedAdapterError: An initialisation that PEFT does not have.
    """
    reasons = {
        "use_qalora": "QALoRA acts on a pooled input, which no weight of the layer's shape can express",
        "arrow_config": "Arrow routes between several adapters by input",
        "alora_invocation_tokens": "aLoRA is active only after its invocation tokens",
    }
    for field, reason in reasons.items():
        if getattr(config, field):
            raise UnmergeableAdapterError(f"{path}: {field} is set: {reason}", hint=SERVE_UNMERGED)
    init = config.init_lora_weights
    if not isinstance(init, str) or init.lower() in _INITS_ON_ORIGINAL_BASE or config.residual_method:
        return
    needs = {
        "pissa_niter": "its residual base comes from a randomised SVD and cannot be recomputed",
        "corda": "its residual base depends on training data",
        "lora_ga": "its residual base depends on training gradients",
        "loftq": "it was trained on a quantised residual base",
    }
    need = next((text for prefix, text in needs.items() if init.lower().startswith(prefix)), None)
    if need is None:
        raise MalformedAdapterError(f"{path}: init_lora_weights {init!r} is none of peft <= 0.21.2")
    if not base_is_residual:
        raise UnmergeableAdapterError(
            f"{path}: init_lora_weights {init!r}: {need}",
            hint="merge it into the base that training saved, with --base-is-residual"
            + ("" if init.lower() == "loftq" else f"; or convert it where it was trained: {_CONVERSION}"),
        )
