"""Tensors that a model shares: one stored, the others absent from the file or copies of it.

Promise: what may be shared is told from the configuration's flag and from what the file lacks; no byte is read here.
Two stored tensors are shared only if their bytes are equal, which the caller compares when it matters.
Source: transformers 5.23, ``_tied_weights_keys`` of every model and ``PreTrainedModel.tie_weights``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_deploy.names.index import NameIndex
from lora_deploy.tensors import TensorSpec

_LM_HEAD = ("lm_head.weight",)
_GROUPS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"), _LM_HEAD),
    (("decoder.embed_tokens.weight",), ("lm_head.weight", "proj_out.weight", "output_projection.weight")),
    (("embed_tokens.weight",), _LM_HEAD),
    (("language_model.embed_tokens.weight",), _LM_HEAD),
    (("text_model.embed_tokens.weight",), _LM_HEAD),
    (("wte.weight",), _LM_HEAD),
    (("tokens_embed.weight",), _LM_HEAD),
    (("word_embeddings.weight",), _LM_HEAD),
    (("embed_in.weight",), _LM_HEAD),
    (("embeddings.weight",), ("lm_head.weight", "head.weight", "pred_layer.proj.weight")),
    (("word_embedding.weight",), ("lm_loss.weight",)),
    (("embeddings.tok_embeddings.weight",), ("decoder.weight",)),
    (
        ("embeddings.word_embeddings.weight",),
        (
            "cls.predictions.decoder.weight",
            "predictions.decoder.weight",
            "lm_head.decoder.weight",
            "generator_lm_head.weight",
            "vocab_projector.weight",
        ),
    ),
)
"""Canonical names of the embeddings that are one matrix, and of the heads that share it when the flag is set."""
_FORCED_TYPES = frozenset({"t5", "mt5", "umt5", "longt5", "switch_transformers", "pix2struct", "udop"})
"""Model types whose flag does not decide about sharing, or also decides about a scale in the forward pass."""
_OWN_HEAD = {"whisper": "proj_out.weight", "rwkv": "head.weight", "biogpt": "output_projection.weight"}
_WITH_HEAD = re.compile(r"LMHead|CausalLM|ConditionalGeneration|MaskedLM|PreTraining|WithLM")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tie:
    """Two names of one matrix."""

    source: str
    """A stored tensor, the input embedding where that one is stored."""
    member: str
    """The name that shares it, as this file calls it or would call it."""
    is_stored: bool
    """Whether the file holds a tensor under the member's name: shared only if its bytes are the source's."""
    is_present: bool
    """Whether the model is known to have the member (a base saved without a head may not)."""
    is_breakable: bool
    """Whether a configuration edit gives the member a tensor of its own."""


def ties_of(index: NameIndex, specs: Mapping[str, TensorSpec], config: Mapping[str, Any]) -> tuple[Tie, ...]:
    """List what the model shares."""
    stored = {index.canonical(name): name for name in specs}
    flag = tie_flag(config)
    ties: dict[str, Tie] = {}
    for embeddings, heads in _GROUPS:
        found = [name for name in embeddings if name in stored]
        if len(embeddings) > 1 and not ("shared.weight" in stored or len(found) > 1):
            continue
        members = [*embeddings, *heads] if flag is not False else [*embeddings]
        source = next((name for name in members if name in stored), None)
        if source is None or (source in heads and flag is None):
            continue
        for member in members:
            if member != source and stored.get(member, member) not in ties:
                tie = _tie(stored, source, member, config, is_head=member in heads or source in heads)
                if _same_shape(specs, tie):
                    ties.setdefault(tie.member, tie)
    return tuple(ties.values())


def tie_flag(config: Mapping[str, Any]) -> bool | None:
    """Read ``tie_word_embeddings``, also where a nested text configuration holds it; None when nobody says."""
    for part in (config, config.get("text_config"), config.get("thinker_config"), config.get("decoder")):
        if isinstance(part, Mapping) and isinstance(flag := part.get("tie_word_embeddings"), bool):
            return flag
    return None


def _tie(stored: Mapping[str, str], source: str, member: str, config: Mapping[str, Any], *, is_head: bool) -> Tie:
    module = member.rpartition(".")[0]
    parent = module.rpartition(".")[0]
    siblings = tuple(f"{path}." for path in (module, parent) if path)
    is_present = (
        member in stored
        or any(name.startswith(siblings) for name in stored)
        or not is_head
        or (member == _OWN_HEAD.get(str(config.get("model_type")), "lm_head.weight") and _has_head(config))
    )
    return Tie(
        source=stored[source],
        member=stored.get(member) or _absent_name(stored[source], source, member, is_head=is_head),
        is_stored=member in stored,
        is_present=is_present,
        is_breakable=is_head and config.get("model_type") not in _FORCED_TYPES,
    )


def _has_head(config: Mapping[str, Any]) -> bool:
    architectures = config.get("architectures")
    return not architectures or any(_WITH_HEAD.search(str(name)) for name in architectures)


def _absent_name(stored: str, source: str, member: str, *, is_head: bool) -> str:
    """Name an absent member in the dialect of the file."""
    if not is_head:
        return stored.removesuffix(source) + member
    if stored.startswith("language_model.model."):
        return f"language_model.{member}"
    return "embed_out.weight" if source == "embed_in.weight" else member


def _same_shape(specs: Mapping[str, TensorSpec], tie: Tie) -> bool:
    return not tie.is_stored or specs[tie.member].shape == specs[tie.source].shape


_VOCABULARY_BIASES = (
    *("lm_head.bias", "lm_head.decoder.bias", "cls.predictions.bias", "cls.predictions.decoder.bias"),
    *("predictions.bias", "predictions.decoder.bias", "vocab_projector.bias", "final_logits_bias"),
)


def vocabulary_names(index: NameIndex, specs: Mapping[str, TensorSpec]) -> tuple[str, ...]:
    """List the stored tensors that have one row, or one entry, for each token."""
    known = {name for embeddings, heads in _GROUPS for name in (*embeddings, *heads)} | set(_VOCABULARY_BIASES)
    return tuple(name for name in specs if index.canonical(name) in known)
