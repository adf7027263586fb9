"""Run a graph as it was drawn, on inputs of another size than it was traced with, beside the model itself.

Promise: a graph that does not run, or says something else than the model, never reaches the cache. What cannot be run
here (another provider's kernels) is said to be untried.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lora_deploy.export.extras import require_onnxruntime
from lora_deploy.tensors import DType

TOLERANCE = {DType.F32: 1e-3, DType.F16: 5e-2, DType.BF16: 2e-1}
"""Largest deviation, as a share of an output's largest value; this is a check of the graph, not of its precision."""


def expected_outputs(module: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:  # noqa: ANN401 - a torch module
    """Run the module itself; outputs by the name that the graph gives them."""
    from transformers.exporters.utils import get_leaf_tensors

    with torch.no_grad():
        return dict(get_leaf_tensors(module(**copy.deepcopy(dict(inputs)))))


def fault_of(model: Any, inputs: Mapping[str, Any], expected: Mapping[str, Tensor], dtype: DType) -> str | None:  # noqa: ANN401
    """Run a graph on the CPU and compare; None when it agrees, else what is wrong, in one line."""
    import onnx_ir
    from transformers.exporters.utils import get_leaf_tensors

    runtime = require_onnxruntime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    try:
        content = onnx_ir.to_proto(model).SerializeToString()
        session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        leaves = get_leaf_tensors(copy.deepcopy(dict(inputs)))
        feed = {}
        for value in session.get_inputs():
            name = value.name.removeprefix("input.")
            if name not in leaves:
                return f"it takes {value.name}, which the model does not"
            feed[value.name] = leaves[name].numpy()
        outputs = dict(zip([value.name for value in session.get_outputs()], session.run(None, feed), strict=True))
    except Exception as error:  # noqa: BLE001 - onnxruntime's own errors have no common class
        return f"onnxruntime: {' '.join(str(error).split())[:300]}"
    for name, value in outputs.items():
        wanted = expected.get(name.removeprefix("output."))
        found = torch.from_numpy(value)
        if wanted is not None and found.shape == wanted.shape:
            found, wanted = (read_positions(output, inputs.get("attention_mask")) for output in (found, wanted))
        fault = deviation(found, wanted, dtype)
        if fault:
            return f"output {name} {fault}"
    return None


def read_positions(output: Tensor, mask: Any) -> Tensor:  # noqa: ANN401 - a tensor or None
    """Leave out what a decoder says at padding, where nothing is attended to and kernels differ as they like.

    Shapes: output (batch, tokens, …) or a cache (batch, heads, tokens, width); mask (batch, tokens).
    """
    if not isinstance(mask, Tensor) or mask.dim() != 2 or output.dim() not in {3, 4}:
        return output
    by_token = output if output.dim() == 3 else output.transpose(1, 2)
    return by_token[mask.bool()] if by_token.shape[:2] == mask.shape else output


def deviation(found: Tensor, expected: Tensor | None, dtype: DType) -> str | None:
    """Say how far an output is from the model's, if it is further than the dtype explains."""
    if expected is None:
        return "is none of the model's"
    if found.shape != expected.shape:
        return f"has shape {tuple(found.shape)}, the model's has {tuple(expected.shape)}"
    if not found.numel():
        return None
    left, right = found.to(torch.float64), expected.to(torch.float64)
    deviation, scale = float((left - right).abs().max()), max(float(right.abs().max()), 1e-6)
    if deviation <= TOLERANCE[dtype] * scale:  # false for NaN
        return None
    return f"differs from the model's by {deviation:.3g} where the largest value is {scale:.3g}"
