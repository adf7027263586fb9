"""What is folded into weights, and what stays in the graph."""

from __future__ import annotations

import numpy as np
import onnx_ir
import pytest
from onnxscript import optimizer

from lora_deploy.export.folding import OnlyLayouts, Rule, folding_by, nothing_of_weights

WEIGHT = np.arange(12, dtype=np.float32).reshape(3, 4)


def optimised(lines: str, rule: Rule) -> onnx_ir.Model:
    """Optimise a graph of an input ``x`` and a weight ``w``, in ONNX's own notation."""
    text = f"""
        <ir_version: 10, opset_import: ["" : 20]>
        graph (float[n, 4] x) => (float[n, m] y)
        <float[3, 4] w = {{{", ".join(str(value) for value in WEIGHT.flatten())}}}>
        {{ {lines} }}
    """
    model = onnx_ir.from_onnx_text(text)
    with folding_by(rule):
        optimizer.optimize_ir(model)
    return model


def operators(model: onnx_ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize(
    ("lines", "left"),
    [
        ("t = Transpose(w) y = MatMul(x, t)", ["MatMul"]),
        ("c = Concat<axis=0>(w, w) t = Transpose(c) y = MatMul(x, t)", ["Transpose", "MatMul"]),
        (
            "two = Constant<value_float=2.0>() s = Mul(w, two) t = Transpose(s) y = MatMul(x, t)",
            ["Mul", "Transpose", "MatMul"],
        ),
        (
            "i = Constant<value_ints=[2, 0, 1]>() g = Gather(w, i) t = Transpose(g) y = MatMul(x, t)",
            ["Gather", "Transpose", "MatMul"],
        ),
        ("one = Constant<value_float=1.0>() p = Add(w, one) y = Add(x, p)", ["Add"]),
        ("half = Constant<value_float=0.5>() p = Add(w, half) y = Add(x, p)", ["Add", "Add"]),
        ("two = Constant<value_float=2.0>() four = Mul(two, two) y = Mul(x, four)", ["Mul"]),
    ],
)
def test_only_what_a_table_can_say_is_folded_into_a_weight(lines: str, left: list[str]) -> None:
    assert operators(optimised(lines, OnlyLayouts(["w"]))) == left


def test_without_the_rule_arithmetic_would_be_folded() -> None:
    assert operators(
        optimised("i = Constant<value_ints=[2, 0, 1]>() g = Gather(w, i) y = Add(x, g)", lambda _: None)
    ) == ["Add"]


def test_a_graph_that_shares_its_weights_reads_them_as_they_are_stored() -> None:
    assert operators(optimised("t = Transpose(w) y = MatMul(x, t)", nothing_of_weights)) == ["Transpose", "MatMul"]


def test_a_norm_is_not_multiplied_into_the_kernel_before_it() -> None:
    text = """
        <ir_version: 10, opset_import: ["" : 20]>
        graph (float[n, 1, 4, 4] x) => (float[n, 1, 4, 4] y)
        <float[1, 1, 1, 1] w = {2.0}, float[1] scale = {3.0}, float[1] shift = {4.0}, float[1] mean = {5.0},
         float[1] var = {6.0}>
        { c = Conv(x, w) y = BatchNormalization(c, scale, shift, mean, var) }
    """
    kept, fused = onnx_ir.from_onnx_text(text), onnx_ir.from_onnx_text(text)
    with folding_by(OnlyLayouts(["w", "scale", "shift", "mean", "var"])):
        optimizer.optimize_ir(kept)
    optimizer.optimize_ir(fused)
    assert operators(kept) == ["Conv", "BatchNormalization"]
    assert operators(fused) == ["Conv"]
