"""The few things that are done to a drawn graph in memory: read initializers, point them at files, write it down.

``onnx_ir`` has no types for a checker to see; this is the module that knows it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from lora_deploy.export.extras import require_onnx_ir
from lora_deploy.tensors import DType

_ONNX_TYPES = {DType.F32: "FLOAT", DType.F16: "FLOAT16", DType.BF16: "BFLOAT16", DType.F64: "DOUBLE"}

Model = Any
"""An ``onnx_ir.Model``."""
Value = Any
"""An ``onnx_ir.Value``."""


def initializers(model: Model) -> Mapping[str, Value]:
    """The initializers of the main graph, by name; the optimiser has lifted those of inner graphs there."""
    return cast("Mapping[str, Value]", dict(model.graph.initializers))


def values_of(value: Value) -> Tensor:
    """An initializer's values, not copied where that can be avoided."""
    raw = getattr(value.const_value, "raw", None)
    if isinstance(raw, Tensor):
        return raw.detach()
    array = value.const_value.numpy()
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view("uint16").copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy() if not (array.flags.writeable and array.flags.c_contiguous) else array)


def onnx_type(dtype: DType) -> Any:  # noqa: ANN401
    """The format as an ``onnx_ir.DataType``."""
    return require_onnx_ir().DataType[_ONNX_TYPES[dtype]]


def external(value: Value, file: str, offset: int, n_bytes: int) -> Any:  # noqa: ANN401
    """A tensor like the initializer's whose values lie in a file beside the graph."""
    ir = require_onnx_ir()
    tensor = value.const_value
    return ir.ExternalTensor(file, offset, n_bytes, tensor.dtype, shape=tensor.shape, name=value.name)


def inline(value: Value) -> Any:  # noqa: ANN401
    """A tensor like the initializer's whose values lie in the graph itself, wherever they were read from."""
    ir = require_onnx_ir()
    tensor = value.const_value
    return ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, shape=tensor.shape, name=value.name)


def without_metadata(model: Model) -> bytes:
    """The graph as a file: no stack traces, paths, or other things that differ from machine to machine."""
    ir = require_onnx_ir()
    for part in _described(model):
        part.metadata_props.clear()
        part.doc_string = None
    return cast("bytes", ir.to_proto(model).SerializeToString(deterministic=True))


def _described(model: Model) -> Iterator[Any]:
    yield model
    for graph in model.graphs():
        yield graph
        yield from graph.inputs
        yield from graph.initializers.values()
        for node in graph:
            yield node
            yield from node.outputs
