"""bitsandbytes: NF4 and FP4 in blocks with a maximum each (the maxima quantised again or not), and int8 in rows.

Law: every value, rounded to float32, is what bitsandbytes 0.50 computes in float32.
Source: bitsandbytes 0.50, ``functional.py``: ``QuantState.as_dict``, ``dequantize_4bit``, ``dequantize_blockwise``,
``int8_vectorwise_dequant``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_deploy.bases.quantisations.interface import PackedTensor, Rows, Unpacking, expect_shape, mapped, not_known
from lora_deploy.checkpoint import Checkpoint
from lora_deploy.errors import MalformedCheckpointError
from lora_deploy.tensors import DType

_STATE = re.compile(r"^(?P<name>.+)\.quant_state\.bitsandbytes__(?P<code>\w+)$")
_MAX_STATE_BYTES = 10_000
_INT8_LIMIT = 127.0


def unpack(checkpoint: Checkpoint, _settings: Mapping[str, Any]) -> Unpacking:
    """Find 4-bit tensors by their quantisation state and 8-bit ones by their row maxima."""
    tensors = []
    for name in checkpoint.tensors:
        if match := _STATE.match(name):
            tensors.append(_four_bit(checkpoint, match["name"], name))
        elif name.endswith(".SCB"):
            tensors.append(_eight_bit(checkpoint, name.removesuffix(".SCB")))
    return Unpacking(tensors=tuple(tensors))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Blocks:
    """A 4-bit tensor: two codes a byte, the first in the high half, and a maximum for each block of elements."""

    packed: Tensor
    """(ceil(n / 2),) uint8."""
    values: Tensor
    """(16,) float64, by code."""
    maxima: Rows
    """Of blocks ``start:stop``, float64."""
    block_size: int
    n_cols: int

    def rows(self, start: int, stop: int) -> Tensor:
        """The product of two float32 numbers has 48 bits: exact."""
        first, last = start * self.n_cols, stop * self.n_cols
        packed = self.packed[first // 2 : (last + 1) // 2]
        codes = torch.stack((packed >> 4, packed & 15), dim=1).reshape(-1)[first % 2 :][: last - first]
        block = first // self.block_size
        maxima = self.maxima(block, -(-last // self.block_size))
        maxima = maxima[torch.arange(first, last) // self.block_size - block]
        return (self.values[codes.int()] * maxima).reshape(stop - start, self.n_cols)


def _four_bit(checkpoint: Checkpoint, name: str, state_name: str) -> PackedTensor:
    state = _state(checkpoint, state_name)
    if state["quant_type"] not in {"nf4", "fp4"}:
        not_known(checkpoint, f"{name}: bitsandbytes type {state['quant_type']!r}")
    shape = tuple(state["shape"])
    n_elements, block_size = math.prod(shape), state["blocksize"]
    nested = "nested_blocksize" in state
    keys = [name, state_name, f"{name}.absmax", f"{name}.quant_map"]
    keys += [f"{name}.nested_absmax", f"{name}.nested_quant_map"] if nested else []
    packed = mapped(checkpoint, name).reshape(-1).view(torch.uint8)
    maxima = expect_shape(f"{name}.absmax", mapped(checkpoint, keys[2]), (-(-n_elements // block_size),))
    blocks = _Blocks(
        packed=expect_shape(name, packed, (-(-n_elements // 2),)),
        values=expect_shape(keys[3], mapped(checkpoint, keys[3]), (16,)).double(),
        maxima=_nested(checkpoint, name, maxima, state) if nested else lambda start, stop: maxima[start:stop].double(),
        block_size=block_size,
        n_cols=shape[-1],
    )
    try:
        dtype = DType.from_long_name(state["dtype"])
    except KeyError:
        not_known(checkpoint, f"{name}: was made from {state['dtype']}")
    return PackedTensor(name=name, shape=shape, keys=tuple(keys), prepare=lambda: blocks.rows, dtype=dtype)


def _state(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    raw = bytes(checkpoint.read(name)[: _MAX_STATE_BYTES + 1])
    try:
        state = json.loads(raw)
        sizes = [*state["shape"], state["blocksize"], state.get("nested_blocksize", 1)]
        if len(raw) <= _MAX_STATE_BYTES and state["shape"] and all(type(n) is int and n > 0 for n in sizes):
            float(state.get("nested_offset", 0))
            return {**state, "quant_type": str(state["quant_type"]), "dtype": str(state["dtype"])}
    except (ValueError, KeyError, TypeError) as error:
        raise MalformedCheckpointError(f"{name}: is no quantisation state of bitsandbytes: {error!r}") from error
    raise MalformedCheckpointError(f"{name}: is no quantisation state of bitsandbytes: {raw[:80]!r}")


def _nested(checkpoint: Checkpoint, name: str, codes: Tensor, state: Mapping[str, Any]) -> Rows:
    """Maxima that are quantised themselves: bitsandbytes defines them by float32 arithmetic, so that is used."""
    size = state["nested_blocksize"]
    scales = mapped(checkpoint, f"{name}.nested_absmax").float()
    expect_shape(f"{name}.nested_absmax", scales, (-(-codes.numel() // size),))
    values = expect_shape(f"{name}.nested_quant_map", mapped(checkpoint, f"{name}.nested_quant_map"), (256,)).float()
    if codes.dtype is not torch.uint8:
        raise MalformedCheckpointError(f"{name}.absmax: found {codes.dtype}, nested maxima are uint8")
    offset = torch.tensor(float(state["nested_offset"]), dtype=torch.float32)

    def maxima(start: int, stop: int) -> Tensor:
        return (values[codes[start:stop].int()] * scales[torch.arange(start, stop) // size] + offset).double()

    return maxima


def _eight_bit(checkpoint: Checkpoint, module: str) -> PackedTensor:
    name, scale_name, form_name = f"{module}.weight", f"{module}.SCB", f"{module}.weight_format"
    weight, keys = mapped(checkpoint, name), [name, scale_name]
    if weight.dtype is not torch.int8 or weight.ndim != 2:
        raise MalformedCheckpointError(f"{name}: found {weight.dtype} of shape {tuple(weight.shape)} beside its .SCB")
    if form_name in checkpoint.tensors:
        keys.append(form_name)
        if mapped(checkpoint, form_name).any():
            not_known(checkpoint, f"{name}: bitsandbytes int8 in a layout for one GPU generation, not in rows")
    scales = mapped(checkpoint, scale_name).double().reshape(-1)
    expect_shape(scale_name, scales, (weight.shape[0],))

    def rows(start: int, stop: int) -> Tensor:
        return weight[start:stop].double() * scales[start:stop, None] / _INT8_LIMIT

    return PackedTensor(name=name, shape=tuple(weight.shape), keys=tuple(keys), prepare=lambda: rows)
