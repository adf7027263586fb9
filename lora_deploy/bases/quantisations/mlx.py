"""MLX: integers of 2, 3, 4 or 8 bits in words along the inputs; a scale and a bias for each group of inputs.

Values are scale · q + bias. A configuration may give single layers a width and a group size of their own.

Source: mlx 0.32, ``mlx.core.quantize`` and ``mlx.nn.QuantizedLinear``; mlx-lm, ``utils.py`` (``quantize_model``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lora_deploy.bases.quantisations.bits import WORD_BITS, fields
from lora_deploy.bases.quantisations.interface import PackedTensor, Rows, Unpacking, expect_shape, mapped, not_known
from lora_deploy.bases.quantisations.scales import spread
from lora_deploy.checkpoint import Checkpoint
from lora_deploy.errors import MalformedCheckpointError
from lora_deploy.tensors import DType

_BITS = (2, 3, 4, 8)


def unpack(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> Unpacking:
    """Find packed layers and embeddings by their ``scales``."""
    mode = settings.get("mode") or "affine"
    if mode != "affine":
        not_known(checkpoint, f"MLX in the mode {mode!r}, not affine")
    modules = [name.removesuffix(".scales") for name in checkpoint.tensors if name.endswith(".scales")]
    return Unpacking(tensors=tuple(_packed(checkpoint, module, settings) for module in modules))


def _packed(checkpoint: Checkpoint, module: str, settings: Mapping[str, Any]) -> PackedTensor:
    own = settings.get(module)
    chosen = {**settings, **own} if isinstance(own, Mapping) else settings
    bits, size = chosen.get("bits"), chosen.get("group_size")
    if bits not in _BITS or chosen.get("mode", "affine") != "affine":
        not_known(checkpoint, f"{module}: MLX of {bits} bits in the mode {chosen.get('mode', 'affine')!r}")
    keys = (f"{module}.weight", f"{module}.scales", f"{module}.biases")
    packed, scales, biases = (mapped(checkpoint, key) for key in keys)
    if checkpoint.tensors[keys[0]].dtype is not DType.U32 or packed.ndim < 2:
        raise MalformedCheckpointError(f"{keys[0]}: found {packed.dtype} {tuple(packed.shape)}, expected uint32 words")
    n_in = packed.shape[-1] * WORD_BITS // bits
    if type(size) is not int or size < 1 or n_in % size:
        raise MalformedCheckpointError(f"{keys[0]}: {n_in} inputs, the configuration says {size} a group")
    shape = (*packed.shape[:-1], n_in)
    for key, tensor in ((keys[1], scales), (keys[2], biases)):
        expect_shape(key, tensor, (*packed.shape[:-1], n_in // size))
    words = packed.view(torch.int32).reshape(-1, packed.shape[-1])
    scale_of, bias_of = (
        spread(key, tensor, shape, (1, size)) for key, tensor in zip(keys[1:], (scales, biases), strict=True)
    )

    def prepare() -> Rows:
        scale, bias = scale_of(), bias_of()

        def rows(start: int, stop: int) -> Tensor:
            """An 11-bit scale times an 8-bit integer and an 11-bit bias: exact but for exponents very far apart."""
            codes = fields(words[start:stop].T, bits).T.double()
            return codes * scale(start, stop) + bias(start, stop)

        return rows

    return PackedTensor(name=keys[0], shape=shape, keys=keys, prepare=prepare)
