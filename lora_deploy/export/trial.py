"""Run a graph as it was drawn, on inputs of another size than it was traced with, beside the model itself.

Promise: a graph that does not run, or says something else than the model, never reaches the cache. What cannot be run
here (another provider's kernels) is said to be untried.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lora_deploy.export.drawn import external, initializers, values_of
from lora_deploy.export.extras import require_onnxruntime
from lora_deploy.tensors import DType

TOLERANCE = {DType.F32: 1e-3, DType.F16: 5e-2, DType.BF16: 2e-1}
"""Largest deviation, as a share of an output's largest value; this is a check of the graph, not of its precision."""
_MIN_LENT_BYTES = 1 << 10


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
        weights = _lend_weights(model, options)
        with _emptied(model, weights):
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


def _lend_weights(model: Any, options: Any) -> dict[str, Tensor]:  # noqa: ANN401
    """Have the runtime read larger weights where they are; they are valid while what is returned lives.

    A graph file may not hold more than 2 GB, and copies of a model are what memory is short of.
    """
    runtime = require_onnxruntime()
    large = {name: value for name, value in initializers(model).items() if value.const_value.nbytes >= _MIN_LENT_BYTES}
    weights = {name: values_of(value).contiguous() for name, value in large.items()}
    lent = [runtime.OrtValue.ortvalue_from_numpy(values.numpy()) for values in weights.values()]
    options.add_external_initializers(list(weights), lent)
    return weights


@contextmanager
def _emptied(model: Any, names: Collection[str]) -> Iterator[None]:  # noqa: ANN401
    """Take some initializers' values out of a model for a while."""
    before = {name: value.const_value for name, value in initializers(model).items() if name in names}
    try:
        for name, tensor in before.items():
            value = model.graph.initializers[name]
            value.const_value = external(value, "weights", 0, tensor.nbytes)
        yield
    finally:
        for name, tensor in before.items():
            model.graph.initializers[name].const_value = tensor


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
