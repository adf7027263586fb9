"""Bases whose weights are packed: found out, named, and refused with the 16-bit original where its name tells.

Source: reference D.7; transformers 5.23, ``quantizers/``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lora_deploy.checkpoint import Checkpoint
from lora_deploy.errors import InputError
from lora_deploy.tensors import DType

_SUFFIX = re.compile(
    r"(?i)[-_.](?:"
    r"(?:unsloth-)?bnb-[48]bit|(?:gptq|awq)(?:-(?:int)?[2348](?:-?bits?)?)?(?:-\d+g)?(?:-actorder(?:_true)?)?|"
    r"(?:mlx-)?[2-8]bit|int[48]|w[48]a(?:4|8|16)|nf4|fp8(?:-dynamic)?|nvfp4|mxfp4|hqq|exl2|gguf|quantized(?:\.\w+)?|"
    r"4bit-(?:gptq|awq)|bf16-4bit"
    r")$"
)
_PACKED_NAMES: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("bitsandbytes", re.compile(r"\.weight\.(?:quant_state\.|absmax$|quant_map$|nested_)|\.SCB$")),
    ("GPTQ or AWQ", re.compile(r"\.(?:qweight|qzeros)$")),
    ("compressed-tensors", re.compile(r"\.weight_packed$")),
    ("FP8", re.compile(r"\.weight_scale(?:_inv)?$")),
)
_PACKED_DTYPES = frozenset({DType.U32, DType.U8, DType.I8, DType.F8_E4M3, DType.F8_E5M2})


def refuse_quantised(checkpoint: Checkpoint) -> None:
    """Pass a checkpoint of plain weights.

    Raises:
        InputError: The weights are packed; the hint names the original where it is known.
    """
    method = quantisation_of(checkpoint)
    if method is None:
        return
    original = _named_original(checkpoint)
    hint = f"use the 16-bit original: --base {original}" if original else "use the 16-bit model it was made from"
    raise InputError(
        f"base {checkpoint.ref.name}: quantised ({method}): packed weights cannot take an update",
        hint=hint,
        code="quantised-base",
    )


def quantisation_of(checkpoint: Checkpoint) -> str | None:
    """Name the method that packed the weights, from configuration, names and dtypes; None for plain ones."""
    for config in (checkpoint.config, checkpoint.config.get("text_config")):
        if isinstance(config, Mapping) and (method := _declared_method(config)) is not None:
            return method
    for method, pattern in _PACKED_NAMES:
        if any(pattern.search(name) for name in checkpoint.tensors):
            return method
    for name, spec in checkpoint.tensors.items():
        if name.endswith("_blocks") and f"{name.removesuffix('blocks')}scales" in checkpoint.tensors:
            return "MXFP4"
        if name.endswith(".weight") and len(spec.shape) > 1 and spec.dtype in _PACKED_DTYPES:
            is_mlx = name.removesuffix("weight") + "scales" in checkpoint.tensors
            return "MLX" if is_mlx else f"{spec.dtype.value} weights"
    return None


def sixteen_bit_original(name: str) -> str | None:
    """Strip the suffix of a quantised model's name; None when it has none. A hint, not a fact."""
    stripped, short = name.rstrip("/"), ""
    while stripped != short:
        short, stripped = stripped, _SUFFIX.sub("", stripped)
    return stripped if stripped != name.rstrip("/") else None


def _declared_method(config: Mapping[str, Any]) -> str | None:
    declared = config.get("quantization_config") or config.get("compression_config") or config.get("quantization")
    if not isinstance(declared, Mapping):
        return None
    method = declared.get("quant_method")
    if method is None:
        has_bits = declared.get("load_in_4bit") or declared.get("load_in_8bit") or "bits" in declared
        return "bitsandbytes" if has_bits and "bits" not in declared else "MLX" if has_bits else "unnamed method"
    return str(method)


def _named_original(checkpoint: Checkpoint) -> str | None:
    names = [checkpoint.ref.name, str(checkpoint.config.get("_name_or_path") or "")]
    return next((original for name in names if (original := sixteen_bit_original(name))), None)
