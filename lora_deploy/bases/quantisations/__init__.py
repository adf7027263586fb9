"""Quantisations that can be undone; one is a module here and one line in ``QUANTISATIONS``.

Promise: importing this package imports no tensor library.
"""

from __future__ import annotations

from lora_deploy.registry import Entry

_PACKAGE = "lora_deploy.bases.quantisations"

QUANTISATIONS: tuple[Entry, ...] = (
    Entry(
        name="bitsandbytes",
        summary="bitsandbytes NF4, FP4 (also with quantised block maxima) and int8",
        path=f"{_PACKAGE}.bitsandbytes:unpack",
    ),
    Entry(name="gptq", summary="GPTQ of 2, 3, 4 and 8 bits, with or without act-order", path=f"{_PACKAGE}.gptq:unpack"),
    Entry(name="awq", summary="AWQ of 4 bits in the gemm layout", path=f"{_PACKAGE}.awq:unpack"),
    Entry(
        name="fp8",
        summary="FP8 with scales for tensors, channels or blocks",
        path=f"{_PACKAGE}.float8:unpack",
    ),
    Entry(
        name="compressed-tensors",
        summary="compressed-tensors: FP8, integers in bytes and in words",
        path=f"{_PACKAGE}.compressed_tensors:unpack",
    ),
    Entry(name="mlx", summary="MLX of 2, 3, 4 and 8 bits", path=f"{_PACKAGE}.mlx:unpack"),
    Entry(name="mxfp4", summary="MXFP4 experts (gpt-oss)", path=f"{_PACKAGE}.mxfp4:unpack"),
)

_OTHER_NAMES = {
    "GPTQ": "gptq",
    "AWQ": "awq",
    "FP8": "fp8",
    "F8_E4M3 weights": "fp8",
    "F8_E5M2 weights": "fp8",
    "fbgemm_fp8": "fp8",
    "modelopt": "fp8",
    "MLX": "mlx",
    "MXFP4": "mxfp4",
}
"""What configurations, and ``quantisation_of``, call a quantisation by other names."""


def quantisation_named(method: str) -> Entry | None:
    """Find the quantisation that a configuration, or ``quantisation_of``, calls by this name; None for others."""
    name = _OTHER_NAMES.get(method, method)
    return next((entry for entry in QUANTISATIONS if entry.name == name), None)
