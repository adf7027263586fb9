"""compressed-tensors: FP8, integers of 8 bits, and integers of 2, 4 or 8 bits packed in int32 words along the inputs.

Values are scale · (q − zero). Packed integers are stored 2^(bits−1) above their value, and so are packed zero points,
which lie along the outputs: the shifts cancel, and without zero points the shift itself is the zero.

Law: every value, rounded to the scale's format, is what compressed-tensors 0.20 decompresses.
Source: compressed-tensors 0.20, ``compressors/pack_quantized`` and ``quantization/lifecycle/forward.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lora_deploy.bases.quantisations import float8
from lora_deploy.bases.quantisations.bits import WORD_BITS, fields
from lora_deploy.bases.quantisations.interface import (
    PackedTensor,
    Rows,
    Unpacking,
    expect_shape,
    mapped,
    not_known,
    weight_schemes,
)
from lora_deploy.bases.quantisations.scales import Block, spread
from lora_deploy.checkpoint import Checkpoint
from lora_deploy.errors import MalformedCheckpointError
from lora_deploy.tensors import DType

_BITS = (2, 4, 8)
_FORMATS = frozenset({"float-quantized", "naive-quantized", "int-quantized", "pack-quantized", "mixed-precision"})
_PACKED = ".weight_packed"


def unpack(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> Unpacking:
    """Find packed layers by their ``weight_packed``, 8-bit ones by their dtype and scale."""
    groups = settings.get("config_groups")
    groups = [*groups.values()] if isinstance(groups, Mapping) else []
    own = [str(group["format"]) for group in groups if isinstance(group, Mapping) and group.get("format")]
    if not {str(settings.get("format")), *own} <= _FORMATS:
        not_known(checkpoint, f"compressed-tensors in the format {settings.get('format')!r} {' '.join(own)}".rstrip())
    weights = weight_schemes(settings)
    tensors = []
    for name, spec in checkpoint.tensors.items():
        if name.endswith(_PACKED):
            tensors.append(_in_words(checkpoint, name.removesuffix(_PACKED), weights))
        elif spec.dtype is DType.I8 and f"{name}_scale" in checkpoint.tensors:
            tensors.append(_in_bytes(checkpoint, name, weights))
    rest = float8.unpack(checkpoint, settings)
    return Unpacking(tensors=(*tensors, *rest.tensors), left_out=rest.left_out)


def _in_words(checkpoint: Checkpoint, module: str, weights: list[Mapping[str, Any]]) -> PackedTensor:
    keys = [f"{module}{_PACKED}", f"{module}.weight_scale", f"{module}.weight_shape"]
    words, scale, stored_shape = (mapped(checkpoint, key) for key in keys)
    if words.dtype is not torch.int32 or words.ndim != 2 or stored_shape.numel() != 2:
        raise MalformedCheckpointError(f"{keys[0]}: found {words.dtype} {tuple(words.shape)}, expected an int32 matrix")
    if f"{module}.weight_g_idx" in checkpoint.tensors:
        not_known(checkpoint, f"{module}: act-order (weight_g_idx)")
    n_out, n_in = (int(n) for n in stored_shape)
    bits = _bits(checkpoint, module, words, n_in, weights)
    expect_shape(keys[0], words, (n_out, _n_words(n_in, bits)))
    scale_of, packed_zeros = spread(keys[1], scale, (n_out, n_in), _block(weights)), None
    if (zero_name := f"{module}.weight_zero_point") in checkpoint.tensors:
        packed_zeros = mapped(checkpoint, zero_name)
        expect_shape(zero_name, packed_zeros, (_n_words(n_out, bits), scale.shape[-1]))
        keys.append(zero_name)

    def prepare() -> Rows:
        zeros, scales = None, scale_of()
        if packed_zeros is not None:
            zeros = spread(zero_name, fields(packed_zeros, bits)[:n_out].float(), (n_out, n_in), _block(weights))()

        def rows(start: int, stop: int) -> Tensor:
            codes = fields(words[start:stop].T, bits).T[:, :n_in].double()
            zero = float(1 << bits - 1) if zeros is None else zeros(start, stop)
            return (codes - zero) * scales(start, stop)

        return rows

    return PackedTensor(name=f"{module}.weight", shape=(n_out, n_in), keys=tuple(keys), prepare=prepare)


def _bits(checkpoint: Checkpoint, module: str, words: Tensor, n_in: int, weights: list[Mapping[str, Any]]) -> int:
    """Find the one declared width that makes this many inputs this many words."""
    declared = [weight.get("num_bits") for weight in weights]
    fitting = [bits for bits in _BITS if bits in declared and _n_words(n_in, bits) == words.shape[1]]
    if len(fitting) != 1:
        said = " or ".join(map(str, declared)) or "unknown"
        not_known(checkpoint, f"{module}: {n_in} inputs in {words.shape[1]} words, of {said} bits")
    return fitting[0]


def _n_words(n_values: int, bits: int) -> int:
    return -(-n_values * bits // WORD_BITS)


def _in_bytes(checkpoint: Checkpoint, name: str, weights: list[Mapping[str, Any]]) -> PackedTensor:
    weight, scale_name, zero_name = mapped(checkpoint, name), f"{name}_scale", f"{name}_zero_point"
    shape, keys = tuple(weight.shape), [name, scale_name]
    matrix = weight.reshape(-1, shape[-1])
    scale_of = spread(scale_name, mapped(checkpoint, scale_name), shape, _block(weights))
    zero_of = None
    if zero_name in checkpoint.tensors:
        keys.append(zero_name)
        zero_of = spread(zero_name, mapped(checkpoint, zero_name).float(), shape, _block(weights))

    def prepare() -> Rows:
        scales, zeros = scale_of(), zero_of() if zero_of is not None else None

        def rows(start: int, stop: int) -> Tensor:
            codes = matrix[start:stop].double()
            return (codes if zeros is None else codes - zeros(start, stop)) * scales(start, stop)

        return rows

    return PackedTensor(name=name, shape=shape, keys=tuple(keys), prepare=prepare)


def _block(weights: list[Mapping[str, Any]]) -> Block | None:
    """Inputs that share a scale, where the configuration gives one number for all."""
    sizes = [weight.get("group_size") for weight in weights]
    size = sizes[0] if sizes and all(other == sizes[0] for other in sizes) else None
    return (1, size) if type(size) is int and size > 0 else None
