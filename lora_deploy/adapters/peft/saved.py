"""Whole tensors of a PEFT file: trained heads and biases, resized embeddings, token rows, and copies of the base's own.

Promise: whole tensors replace, they are no differences; a copy below a LoRA layer is never a result.
Source: peft 0.21.2, ``utils/save_and_load.py`` and ``tuners/trainable_tokens``.
"""

from __future__ import annotations

from lora_deploy.adapter import ModuleUpdate, Orientation
from lora_deploy.adapters.factors import check_finite, factor
from lora_deploy.adapters.interface import AdapterFile
from lora_deploy.adapters.peft.config import PeftConfig
from lora_deploy.adapters.peft.key_table import KeyTable
from lora_deploy.errors import MalformedAdapterError
from lora_deploy.updates.replacement import Replacement
from lora_deploy.updates.token_rows import TokenRows


def read_saved_tensors(file: AdapterFile, table: KeyTable) -> tuple[ModuleUpdate, ...]:
    """Read the tensors that training saved whole.

    Raises:
        MalformedAdapterError: An empty tensor.
        NonFiniteTensorError: A NaN or an infinity.
    """
    for key in table.tensors.values():
        if not file.tensors[key].numel():
            raise MalformedAdapterError(
                f"{file.path}: {key}: is empty, shape {tuple(file.tensors[key].shape)}",
                hint="gather the parameters (DeepSpeed ZeRO-3, FSDP) before saving the adapter",
            )
        check_finite(file, key)
    return tuple(_replacement(file, target, key) for target, key in table.tensors.items())


def read_copies(file: AdapterFile, table: KeyTable) -> tuple[ModuleUpdate, ...]:
    """Read the copies of the base's own tensors; their values are not checked, they are not used as a result."""
    return tuple(_replacement(file, target, key) for target, key in table.copies.items())


def read_token_rows(file: AdapterFile, table: KeyTable, config: PeftConfig) -> tuple[ModuleUpdate, ...]:
    """Read trained rows of embeddings: final values, in the order of the configuration's indices.

    Raises:
        MalformedAdapterError: The indices are missing, repeated, negative, or not as many as the rows.
    """
    return tuple(_token_rows(file, embedding, key, config) for embedding, key in table.tokens.items())


def _replacement(file: AdapterFile, target: str, key: str) -> ModuleUpdate:
    update = Replacement(values=file.tensors[key])
    return ModuleUpdate(target=target, update=update, orientation=Orientation.STORED, keys=(key,))


def _token_rows(file: AdapterFile, embedding: str, key: str, config: PeftConfig) -> ModuleUpdate:
    rows = factor(file, key, n_dims=(2,))
    indices = _indices(embedding, config)
    if indices is None:
        raise MalformedAdapterError(
            f"{file.path}: {key}: trained rows, but trainable_token_indices names no token of {embedding}",
            hint="the configuration beside the file must be the one it was trained with",
        )
    if len(indices) != len(rows) or len(set(indices)) != len(indices) or min(indices) < 0:
        raise MalformedAdapterError(
            f"{file.path}: {key}: {len(rows)} rows for {len(set(indices))} distinct token ids {list(indices[:8])}"
        )
    return ModuleUpdate(
        target=f"{embedding}.weight",
        update=TokenRows(indices=indices, values=rows),
        orientation=Orientation.STORED,
        keys=(key,),
    )


def _indices(embedding: str, config: PeftConfig) -> tuple[int, ...] | None:
    indices = config.trainable_token_indices
    if not isinstance(indices, dict):
        return indices
    names = [name for name in indices if embedding == name or embedding.endswith(f".{name}")]
    return indices[max(names, key=len)] if names else None
