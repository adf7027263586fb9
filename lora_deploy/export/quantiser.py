"""Ask onnxruntime's own quantisers what they make of one product of matrices, ``Y = A · B`` with a constant B.

Promise: operators, scales and packed bytes are the tool's, not ours. It is given a graph of one ``MatMul``, so that the
memory is a few copies of one weight, whatever the model's size, and so that it never meets what it cannot read (its
shape inference stops at fused operators). What it makes depends on B's shape and dtype alone, but for B's own values.
Source: onnxruntime 1.32 ``quantization/matmul_nbits_quantizer.py``, ``quantization/quantize.py``.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lora_deploy.export.binding_table import Span
from lora_deploy.export.extras import require_onnx, require_onnxruntime
from lora_deploy.export.quantisation import Quantisation
from lora_deploy.merge.shard import bytes_of

ACTIVATION, WEIGHT, PRODUCT, NODE = "<activation>", "<weight>", "<product>", "<node>"
"""Placeholders in the names of what the tool makes: of A, B, Y and the node."""
_LINE_BYTES = 64
"""The parts of a quantised weight begin at multiples of this."""
_TYPES = {torch.float32: "FLOAT", torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16"}
_OPSET, _IR_VERSION = 20, 10

Proto: TypeAlias = Any
"""A message of the onnx package, which has no types."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rewriting:
    """What takes the place of one product."""

    nodes: tuple[Proto, ...]
    parts: Mapping[str, Proto]
    """Initializers that are made of the weight, by name, the largest first; without values."""
    spans: Mapping[str, Span]
    """Where each part lies among the bytes of the quantised weight."""
    n_bytes: int
    """Of all parts, with the gaps between them."""
    opsets: Mapping[str, int]
    """Version of the operators by domain, for domains other than the standard one."""


@lru_cache(maxsize=64)
def rewriting(shape: tuple[int, ...], dtype: torch.dtype, by: Quantisation) -> Rewriting:
    """What the tool makes of a product with a weight of this shape (in, out)."""
    model = _quantise(torch.zeros(shape, dtype=dtype), by)
    parts, spans, end = {}, {}, 0
    for tensor in sorted(model.graph.initializer, key=lambda tensor: len(tensor.raw_data), reverse=True):
        start, n_bytes = -(-end // _LINE_BYTES) * _LINE_BYTES, len(tensor.raw_data)
        spans[tensor.name], end = Span(start=start, n_bytes=n_bytes), start + n_bytes
        tensor.ClearField("raw_data")
        parts[tensor.name] = tensor
    opsets = {opset.domain: opset.version for opset in model.opset_import if opset.domain}
    return Rewriting(nodes=tuple(model.graph.node), parts=parts, spans=spans, n_bytes=end, opsets=opsets)


def quantised(weight: Tensor, by: Quantisation) -> Tensor:
    """Quantise a weight (in, out): the bytes of all parts, in the order and with the gaps of its ``Rewriting``."""
    made = rewriting(tuple(weight.shape), weight.dtype, by)
    content = torch.zeros(made.n_bytes, dtype=torch.uint8)
    for tensor in _quantise(weight, by).graph.initializer:
        span = made.spans[tensor.name]
        content[span.start : span.start + span.n_bytes] = torch.frombuffer(
            bytearray(tensor.raw_data), dtype=torch.uint8
        )
    return content


def _quantise(weight: Tensor, by: Quantisation) -> Proto:
    """Let the tool have a graph of one product."""
    product = _product(weight)
    require_onnxruntime()
    with _unheard():
        if by.method == "int8":
            return _dynamic(product)
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        tool = MatMulNBitsQuantizer(
            product,
            bits=by.bits,
            block_size=by.block_size,
            is_symmetric=by.is_symmetric,
            accuracy_level=by.accuracy_level,
        )
        tool.process()
        return tool.model.model


def _dynamic(product: Proto) -> Proto:
    """Quantise weights to unsigned bytes: signed ones overflow in the kernels of CPUs that have AVX2 and no VNNI."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "product.onnx"
        quantize_dynamic(product, path, op_types_to_quantize=["MatMul"], per_channel=True, weight_type=QuantType.QUInt8)
        return _with_raw_values(require_onnx().load(str(path)))


def _with_raw_values(model: Proto) -> Proto:
    """Store every initializer's values as bytes, however the tool wrote them."""
    helper = require_onnx().numpy_helper
    for tensor in model.graph.initializer:
        tensor.CopyFrom(helper.from_array(helper.to_array(tensor), tensor.name))
    return model


def _product(weight: Tensor) -> Proto:
    onnx = require_onnx()
    rows, columns = weight.shape
    dtype = getattr(onnx.TensorProto, _TYPES[weight.dtype])
    values = bytes(bytes_of(weight))
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", [ACTIVATION, WEIGHT], [PRODUCT], name=NODE)],
        "product",
        [onnx.helper.make_tensor_value_info(ACTIVATION, dtype, ["n", rows])],
        [onnx.helper.make_tensor_value_info(PRODUCT, dtype, ["n", columns])],
        [onnx.helper.make_tensor(WEIGHT, dtype, [rows, columns], values, raw=True)],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION)


@contextmanager
def _unheard() -> Iterator[None]:
    """Keep the tools' log to themselves; importing one of them sets up the root logger, which is undone."""
    root, disabled = logging.getLogger(), logging.root.manager.disable
    handlers, level = list(root.handlers), root.level
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.disable(disabled)
