"""Rows of an update: some of them, or all in the order that the base has them.

Trainers that keep the layout of Meta's first release turn neighbouring rows of a query or key projection together, 2i
with 2i + 1 of each head; transformers turns row i with i + half. Both compute the same attention, with their rows in
different orders; what was trained in one must be brought into the other before it is added.
Source: transformers 5.23, ``convert_llama_weights_to_hf.py`` (``permute``); torchtune 0.6.1, ``convert_weights.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from lora_deploy.adapter import RowOrder
from lora_deploy.errors import UnmergeableAdapterError
from lora_deploy.updates.addition import Addition
from lora_deploy.updates.additive import Additive
from lora_deploy.updates.dora import Dora
from lora_deploy.updates.hadamard import Hadamard
from lora_deploy.updates.interface import Update
from lora_deploy.updates.kronecker import Kronecker
from lora_deploy.updates.low_rank import LowRank
from lora_deploy.updates.replacement import Replacement
from lora_deploy.validate.base import Base

if TYPE_CHECKING:
    from torch import Tensor

_QUERY_OR_KEY = re.compile(r"(?:^|\.)(?P<side>[qk])_proj\.(?:weight|bias)$")
_HALVES_IN_TORCHTUNE = frozenset({"qwen2", "qwen2_5_vl", "qwen3", "phi3"})
"""Model types that torchtune trains with the rows that transformers has."""


def cut_rows(update: Update, rows: slice | Tensor) -> Update:
    """Restrict an update to some of its rows, or take them in another order (int64 indices).

    Raises:
        UnmergeableAdapterError: The kind is not defined row by row.
    """
    if isinstance(update, LowRank | Hadamard) or (isinstance(update, Kronecker) and isinstance(rows, slice)):
        return update.rows(rows)  # type: ignore[arg-type] # a Kronecker product's are a slice
    if isinstance(update, Replacement | Addition):
        values = update.values
        return replace(update, values=values.reshape(-1, values.shape[-1])[rows] if values.ndim > 1 else values[rows])
    if isinstance(update, Dora) and update.axis == "rows" and isinstance(update.inner, LowRank | Additive):
        inner = cut_rows(update.inner, rows)
        assert isinstance(inner, LowRank | Additive)  # noqa: S101 - as it was
        return replace(update, inner=inner, magnitude=update.magnitude[rows])
    raise UnmergeableAdapterError(f"a {update.kind} update cannot be cut where base stores its rows in several tensors")


def in_base_order(update: Update, order: RowOrder, name: str, base: Base) -> Update:
    """Give an update whose rows are in this order with them in the order of the base's tensor of this name.

    Raises:
        UnmergeableAdapterError: The base does not say how many heads the rows are, or they do not fit.
    """
    if order is RowOrder.STORED:
        return update
    rows = _unpaired(update, name, base)
    was_paired = order is RowOrder.PAIRED or _HALVES_IN_TORCHTUNE.isdisjoint(base.model_types)
    if order is not RowOrder.TORCHTUNE_EXPORT:
        return cut_rows(update, rows) if was_paired else update
    if was_paired:  # the exporter brought B into order, and forgot the magnitudes
        return replace(update, magnitude=update.magnitude[rows]) if isinstance(update, Dora) else update
    back = torch.argsort(rows)  # the exporter changed an order that was right
    if isinstance(update, Dora):
        assert isinstance(update.inner, LowRank)  # noqa: S101 - torchtune trains nothing else
        return replace(update, inner=update.inner.rows(back))
    return cut_rows(update, back)


def _unpaired(update: Update, name: str, base: Base) -> Tensor:
    """Indices of paired rows in the order of halves: (n_rows,) int64."""
    match = _QUERY_OR_KEY.search(name)
    if match is None:
        raise UnmergeableAdapterError(f"rows in rotary pairs, and {name} is no q_proj or k_proj")
    n_heads = _n_heads(base.config, match["side"])
    n_rows = update.values.shape[0] if isinstance(update, Replacement) else update.shape[0]
    if not n_heads or n_rows % (2 * n_heads):
        told = f"{n_heads} heads do not divide its {n_rows} rows" if n_heads else "the base's configuration names none"
        raise UnmergeableAdapterError(f"rows in rotary pairs of heads: {told}")
    return torch.arange(n_rows).reshape(n_heads, -1, 2).transpose(1, 2).reshape(-1)


def _n_heads(config: Mapping[str, Any], side: str) -> int | None:
    names = ("num_attention_heads",) if side == "q" else ("num_key_value_heads", "num_attention_heads")
    text = config.get("text_config")
    for source in (config, text if isinstance(text, Mapping) else {}):
        for name in names:
            value = source.get(name)
            if isinstance(value, int) and value > 0:
                return value
    return None
