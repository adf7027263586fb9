"""How weights are quantised: what may be chosen, and what it comes to. No tensor library is imported.

Three methods, all of them onnxruntime's own:

    int4             weight-only, 4 bits in blocks along a column: ``MatMulNBits``
    int8-blockwise   weight-only, 8 bits in blocks: ``MatMulNBits``
    int8             dynamic: weights of 8 bits with one scale a column, activations quantised while the graph runs:
                     ``MatMulInteger``

The dynamic one is what many tools call int8. It is far worse than the blocks: on SmolLM2-135M it loses some 70 times as
much, because a few large activations leave no bits for the others.
"""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict

from lora_deploy.errors import ExportError
from lora_deploy.export.options import ExportOptions
from lora_deploy.tensors import DType

Method = Literal["int4", "int8-blockwise", "int8"]
BLOCK_SIZES = (16, 32, 64, 128, 256)
"""Sizes that onnxruntime's kernels know."""
DEFAULT_BLOCK_SIZE = 32
_BITS = {"int4": 4, "int8-blockwise": 8, "int8": 8}
_CPU_ACCURACY_LEVEL = 4
"""Inner products of 8-bit integers: without it onnxruntime's CPU kernels for 8-bit blocks take 30 times as long, for a
third less error; for 4-bit blocks it is as exact, and up to twice as fast."""


class Quantisation(BaseModel):
    """A method with its options resolved: with the weights, it decides every quantised byte."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Method
    block_size: int | None = None
    """Weights that share a scale, along a column; None where a whole column does."""
    is_symmetric: bool | None = None
    """Whether a block has no zero point of its own; None where there is no choice."""
    accuracy_level: int | None = None
    """``accuracy_level`` of ``MatMulNBits``: 4 multiplies integers, None leaves it to the provider."""

    @property
    def bits(self) -> int:
        """Width of a quantised weight."""
        return _BITS[self.method]


def quantisation_of(options: ExportOptions, dtype: DType) -> Quantisation | None:
    """Resolve what is to be quantised, and how; None for nothing.

    Raises:
        ExportError: The options contradict each other, or onnxruntime cannot do it.
    """
    if options.quantize is None:
        if options.block_size is not None or options.is_symmetric is not None:
            raise ExportError("--block-size, --symmetric: nothing is to be quantised", hint="--quantize int4")
        return None
    if options.quantize not in get_args(Method):
        raise ExportError(f"--quantize: found {options.quantize}, expected {', '.join(get_args(Method))}")
    if options.storage == "shared":
        raise ExportError(
            "--weights shared with --quantize: the checkpoint's files hold no quantised weights",
            hint="--weights external",
        )
    if options.quantize == "int8":
        return _dynamic(options, dtype)
    size = DEFAULT_BLOCK_SIZE if options.block_size is None else options.block_size
    if size not in BLOCK_SIZES:
        known = ", ".join(str(known) for known in BLOCK_SIZES)
        raise ExportError(f"--block-size: found {size}, expected a power of two that onnxruntime knows: {known}")
    return Quantisation(
        method="int4" if options.quantize == "int4" else "int8-blockwise",
        block_size=size,
        is_symmetric=bool(options.is_symmetric),
        accuracy_level=_CPU_ACCURACY_LEVEL if options.provider == "cpu" else None,
    )


def _dynamic(options: ExportOptions, dtype: DType) -> Quantisation:
    hint = "--quantize int8-blockwise"
    if options.block_size is not None or options.is_symmetric is not None:
        raise ExportError("--quantize int8: has one scale and zero point a column, no blocks", hint=hint)
    if options.provider != "cpu":
        raise ExportError(f"--quantize int8: onnxruntime runs it on the CPU, not on {options.provider}", hint=hint)
    if dtype is not DType.F32:
        message = f"--quantize int8: onnxruntime quantises float32 activations only, the graph's are {dtype.long_name}"
        raise ExportError(message, hint=f"--dtype float32, or {hint}", code="provider-dtype")
    return Quantisation(method="int8")
