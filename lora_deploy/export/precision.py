"""Which number format an export may compute in: what the weights allow, and what the provider can run.

Promise: nothing is rounded twice. A merged checkpoint in 16 bits gives a graph in those 16 bits or, without loss, in
float32; any other format is made from adapter and base.
"""

from __future__ import annotations

from collections.abc import Mapping

from lora_deploy.errors import ExportError, Finding, Severity
from lora_deploy.export.options import DTYPE_CHOICES
from lora_deploy.tensors import DType, TensorSpec

_RUNS = {"cpu": (DType.F32, DType.F16), "cuda": (DType.F32, DType.F16, DType.BF16)}
_CHOICES = {dtype.long_name: dtype for dtype in (DType.F32, DType.F16, DType.BF16)}


def own_dtype(specs: Mapping[str, TensorSpec]) -> DType:
    """The floating format that most bytes are stored in; float32 where there are none."""
    sizes: dict[DType, int] = {}
    for spec in specs.values():
        if spec.dtype.is_floating:
            sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.n_bytes
    return max(sizes, key=lambda dtype: sizes[dtype], default=DType.F32)


def graph_dtype(
    name: str, specs: Mapping[str, TensorSpec], chosen: str | None, provider: str, *, is_merged: bool
) -> DType:
    """Decide what the graph computes in.

    ``is_merged`` says that the weights were rounded before, when they were merged.

    Raises:
        ExportError: The weights would be rounded a second time, or the provider cannot run the format.
    """
    own = own_dtype(specs)
    found = own.long_name if chosen is None else chosen
    wanted = _CHOICES.get(found)
    if wanted is None:
        raise ExportError(f"dtype: found {found}, expected {', '.join(DTYPE_CHOICES)}", hint="--dtype float32")
    if is_merged and own in {DType.F16, DType.BF16} and wanted not in {own, DType.F32}:
        raise ExportError(
            f"{name}: its weights are {own.long_name} already; as {wanted.long_name} they would be rounded twice",
            hint=f"export from adapter and base: --adapter ADAPTER --base BASE --dtype {wanted.long_name}; "
            f"or --dtype {own.long_name}, or float32",
            code="rounded-twice",
        )
    if wanted not in _RUNS[provider]:
        can = " and ".join(dtype.long_name for dtype in _RUNS[provider])
        raise ExportError(
            f"--provider {provider}: onnxruntime cannot run {wanted.long_name} there, only {can}",
            hint="--dtype float32, or --provider cuda",
            code="provider-dtype",
        )
    return wanted


def dtype_findings(dtype: DType, provider: str) -> tuple[Finding, ...]:
    """What is worth knowing about a format that runs."""
    if dtype is DType.F16 and provider == "cpu":
        message = "float16 runs on the CPU with casts: it computes in float32, as fast and in as much memory as float32"
        return (Finding(code="float16-casts", severity=Severity.NOTE, target="--dtype", message=message),)
    return ()
