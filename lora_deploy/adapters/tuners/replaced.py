"""LN_TUNING, TRAINABLE_TOKENS and BEFT: normalisations, rows of embeddings and biases, trained as they are.

The first two replace what the base has; BEFT adds to its bias.
Source: peft 0.21.2, ``tuners/ln_tuning``, ``tuners/trainable_tokens`` and ``tuners/beft``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction

from lora_deploy.adapter import ModuleUpdate, Orientation
from lora_deploy.adapters.adapted import Adapted
from lora_deploy.adapters.factors import factor
from lora_deploy.adapters.tuners.config import TunerConfig
from lora_deploy.adapters.tuners.interface import Reading, Tuner
from lora_deploy.updates.addition import Addition
from lora_deploy.updates.interface import Scale, Update
from lora_deploy.updates.replacement import Replacement
from lora_deploy.updates.token_rows import TokenRows

_ADDED = Scale(factor=Fraction(1), source="BEFT has no scale")


class TokensConfig(TunerConfig):
    """Configuration of TRAINABLE_TOKENS."""

    token_indices: tuple[int, ...] = ()


def _normalisations(modules: Sequence[Adapted], config: TunerConfig) -> Reading:
    del config
    return Reading(updates=[update for module in modules for update in _normalisation(module)])


def _normalisation(module: Adapted) -> Iterator[ModuleUpdate]:
    for slot, key in module.slots.items():
        values = factor(module.file, key, n_dims=(1,))
        parameter = slot.rpartition(".")[2]
        yield _whole(module, parameter, Replacement(values=values), key)


def _tokens(modules: Sequence[Adapted], config: TokensConfig) -> Reading:
    return Reading(updates=[_rows(module, config.token_indices) for module in modules])


def _rows(module: Adapted, indices: tuple[int, ...]) -> ModuleUpdate:
    rows = module.factor("trainable_tokens_delta", None, None)
    if len(indices) != len(rows) or len(set(indices)) != len(indices) or min(indices) < 0:
        raise module.malformed(f"{len(rows)} rows for {len(set(indices))} distinct token ids {list(indices[:8])}")
    (key,) = module.slots.values()
    return _whole(module, "weight", TokenRows(indices=indices, values=rows), key)


def _biases(modules: Sequence[Adapted], config: TunerConfig) -> Reading:
    del config
    return Reading(updates=[_bias(module) for module in modules])


def _bias(module: Adapted) -> ModuleUpdate:
    (key,) = module.slots.values()
    values = factor(module.file, key, n_dims=(1, 2))
    if values.ndim == 2 and values.shape[0] != 1:
        raise module.malformed(f"beft_bias has shape {tuple(values.shape)}, expected (out) or (1, out)")
    return _whole(module, "bias", Addition(values=values.flatten(), scale=_ADDED), key)


def _whole(module: Adapted, parameter: str, update: Update, key: str) -> ModuleUpdate:
    aimed = module.update(update, keys=(key,), orientation=Orientation.STORED)
    return replace(aimed, target=f"{module.path}.{parameter}")


LN_TUNING = Tuner(
    peft_type="LN_TUNING",
    config=TunerConfig,
    slots=(("ln_tuning_layers", r"\.(weight|bias)"),),
    read=_normalisations,
)
TRAINABLE_TOKENS = Tuner(
    peft_type="TRAINABLE_TOKENS",
    config=TokensConfig,
    slots=(("trainable_tokens_delta", ""),),
    copies={("trainable_tokens_original", ""): "the rows that training started from"},
    read=_tokens,
)
BEFT = Tuner(peft_type="BEFT", config=TunerConfig, slots=(("beft_bias", ""),), read=_biases)
