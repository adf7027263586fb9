"""FP8: weights in E4M3 or E5M2 times a scale for the whole tensor, a channel, or a block of rows by columns.

The stored scale multiplies, also where it is called ``scale_inv`` (the inverse of the one that quantisation used).
Weights without any scale, in a model that declares none, are plain numbers in eight bits. What says how activations
are quantised is left out: a 16-bit model's are not.

Law: every value, rounded to float32, is what transformers 5.23 computes in float32.
Source: transformers 5.23, ``integrations/finegrained_fp8.py`` (``Fp8Dequantize``) and ``integrations/fbgemm_fp8.py``;
compressed-tensors 0.20, ``quantization/lifecycle/forward.py`` (``dequantize``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lora_deploy.bases.quantisations.interface import PackedTensor, Rows, Unpacking, mapped, not_known, weight_schemes
from lora_deploy.bases.quantisations.scales import Block, spread
from lora_deploy.checkpoint import Checkpoint
from lora_deploy.errors import MalformedCheckpointError
from lora_deploy.tensors import DType

_FLOAT8 = frozenset({DType.F8_E4M3, DType.F8_E5M2})
_SCALES = ("_scale_inv", "_scale")
_OF_ACTIVATIONS = re.compile(
    r"(?:^|[._])(?:input|activation|output|[qkv]|kv)_(?:scale|zero_point|global_scale)(?:_ub)?$"
)


def unpack(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> Unpacking:
    """Find FP8 weights, each with the scale of its name."""
    _refuse_other_forms(checkpoint, settings)
    found = {name: spec for name, spec in checkpoint.tensors.items() if spec.dtype in _FLOAT8 and len(spec.shape) > 1}
    scales = {name: scale for name in found if (scale := _scale_name(checkpoint, name)) is not None}
    bare = sorted(found.keys() - scales.keys())
    if bare and (scales or settings):
        raise MalformedCheckpointError(f"{bare[0]}: is in FP8 and has no scale {bare[0]}{_SCALES[0]} or {_SCALES[1]}")
    block = _block_size(settings)
    left_out = tuple(
        name for name in checkpoint.tensors if _OF_ACTIVATIONS.search(name) and name not in scales.values()
    )
    return Unpacking(
        tensors=tuple(_packed(checkpoint, name, scales.get(name), block) for name in found), left_out=left_out
    )


def _refuse_other_forms(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> None:
    method = settings.get("quant_method")
    if method == "modelopt" and settings.get("quant_algo") not in ("FP8", "FP8_PB_WO"):
        not_known(checkpoint, f"modelopt {settings.get('quant_algo')!r}, not FP8")


def _scale_name(checkpoint: Checkpoint, name: str) -> str | None:
    return next((name + suffix for suffix in _SCALES if name + suffix in checkpoint.tensors), None)


def _block_size(settings: Mapping[str, Any]) -> Block | None:
    """Rows and columns of a block as the configuration declares them."""
    declared = [settings.get("weight_block_size"), *(w.get("block_structure") for w in weight_schemes(settings))]
    sizes = [size for size in declared if size is not None]
    for size in sizes:
        is_pair = isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)
        if not is_pair or size != sizes[0]:
            raise MalformedCheckpointError(
                f"quantization_config: found block sizes {sizes}, expected one of two numbers"
            )
    return (sizes[0][0], sizes[0][1]) if sizes else None


def _packed(checkpoint: Checkpoint, name: str, scale_name: str | None, block: Block | None) -> PackedTensor:
    weight = mapped(checkpoint, name)
    shape = tuple(weight.shape)
    matrix = weight.reshape(-1, shape[-1])
    if scale_name is None:
        return PackedTensor(
            name=name,
            shape=shape,
            keys=(name,),
            prepare=lambda: lambda start, stop: matrix[start:stop].float().double(),
        )
    spread_scale = spread(scale_name, mapped(checkpoint, scale_name), shape, block)

    def prepare() -> Rows:
        scale = spread_scale()
        # A number of 4 bits times one of 24 is exact.
        return lambda start, stop: matrix[start:stop].float().double() * scale(start, stop)

    return PackedTensor(name=name, shape=shape, keys=(name, scale_name), prepare=prepare)
