"""Bases whose weights are packed: found out, named, and refused with the 16-bit original where its name tells.

Unpacking them is another verb, ``dequantise``.

Source: reference D.7; transformers 5.23, ``quantizers/``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lora_deploy.bases.quantisations import quantisation_named
from lora_deploy.checkpoint import Checkpoint, CheckpointRef, contained_path, read_json
from lora_deploy.errors import Finding, InputError, Severity
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
    ("compressed-tensors", re.compile(r"\.weight_(?:packed|shape|zero_point|g_idx)$")),
    ("FP8", re.compile(r"\.weight_scale(?:_inv)?$")),
)
_PACKED_DTYPES = frozenset({DType.U32, DType.U8, DType.I8, DType.F8_E4M3, DType.F8_E5M2})


SETTINGS_FILES: Mapping[str, str] = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Files that held what ``config.json`` holds today, and whose they are."""
DEQUANTISED = "dequantised-base"
"""Code of the finding that a base was unpacked."""
_DECLARING = ("quantization_config", "compression_config", "quantization")
"""Keys of a configuration that say how weights are packed."""


def refuse_quantised(checkpoint: Checkpoint) -> None:
    """Pass a checkpoint of plain weights.

    Raises:
        InputError: The weights are packed; the hint names the original where it is known, and what would unpack them.
    """
    method = quantisation_of(checkpoint)
    if method is not None:
        raise quantised_error(checkpoint, method, "packed weights cannot take an update")


def quantised_error(checkpoint: Checkpoint, method: str, problem: str) -> InputError:
    """Say that a base is quantised, and what to do about it."""
    original = _named_original(checkpoint)
    hint = f"use the 16-bit original: --base {original}" if original else "use the 16-bit model it was made from"
    if quantisation_named(method) is not None and checkpoint.ref.pipeline is None and not checkpoint.components:
        hint += ", or unpack this one: --dequantize"
    return InputError(
        f"base {checkpoint.ref.name}: quantised ({method}): {problem}",
        hint=hint,
        code="quantised-base",
    )


def dequantised_finding(ref: CheckpointRef, packed: str, more: str = "") -> Finding:
    """Note that the base was unpacked; its record then says that the merge needs ``--dequantize``."""
    message = f"{packed}: the merge is into what they stand for{more}"
    return Finding(code=DEQUANTISED, severity=Severity.NOTE, target=ref.name, message=message)


def settings_of(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Give what a base says about its packing, in its configuration or in a file beside it; empty when nothing."""
    for config in (checkpoint.config, checkpoint.config.get("text_config")):
        if isinstance(config, Mapping):
            for key in _DECLARING:
                if isinstance(config.get(key), Mapping):
                    return dict(config[key])
    for name in SETTINGS_FILES:
        if (checkpoint.root / name).is_file():
            return read_json(contained_path(checkpoint.root, name))
    return {}


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Take out of a configuration, and of those nested in it, how weights are packed."""
    return {
        key: plain_config(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in _DECLARING
    }


def quantisation_of(checkpoint: Checkpoint) -> str | None:
    """Name the method that packed the weights, from configuration, names and dtypes; None for plain ones."""
    for config in (checkpoint.config, checkpoint.config.get("text_config")):
        if isinstance(config, Mapping) and (method := _declared_method(config)) is not None:
            return method
    for file, method in SETTINGS_FILES.items():
        if (checkpoint.root / file).is_file() and any(name.endswith(".qweight") for name in checkpoint.tensors):
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
    declared = next((config[key] for key in _DECLARING if config.get(key)), None)
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
