"""What may be computed of weights when a graph is optimised, and what stays in the graph.

An optimiser folds whatever is constant to it, weights included. What it makes of them must be something that a binding
table can say: another layout, a wider format, ``1 + w``. Everything else (a table's entries put into place, a norm
multiplied into a kernel) stays a node; onnxruntime folds it when it loads the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

_RESHAPING = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Cast"})
"""Operators that leave a weight's elements in their order."""
Node = Any
"""An ``onnx_ir.Node``."""


Rule: TypeAlias = Callable[[Node], "bool | None"]
"""Says that a constant node is not folded (False), or leaves it to the optimiser's own rules (None)."""


def nothing_of_weights(node: Node) -> bool | None:
    """Leave weights in the layout that the checkpoint has: what reads one is not folded."""
    reads_floats = any(
        value is not None and value.is_initializer() and value.const_value.dtype.is_floating_point()
        for value in node.inputs
    )
    return False if node.op_type == "Resize" or reads_floats else None


class OnlyLayouts:
    """Folds into weights only what a table can explain; asked in the order of the graph, it follows them through."""

    def __init__(self, weights: Iterable[str]) -> None:
        """Know weights by their names in the traced graph."""
        self._stored = frozenset(weights)
        self._laid: set[str] = set()
        """Values made of weights by a change of layout."""

    def __call__(self, node: Node) -> bool | None:
        """Decide on one node; see ``Rule``."""
        inputs = [value.name for value in node.inputs if value is not None]
        made_of_weights = [name for name in inputs if name in self._stored or name in self._laid]
        if not made_of_weights:
            return False if node.op_type == "Resize" else None
        if not self._is_explained(node, inputs, made_of_weights):
            return False
        self._laid.update(value.name for value in node.outputs)
        return None

    def _is_explained(self, node: Node, inputs: list[str], weights: list[str]) -> bool:
        if node.op_type in _RESHAPING:
            return True
        if node.op_type == "Transpose":  # of a weight's own axes, not of those that a view of it has
            return weights[0] in self._stored
        if node.op_type == "Concat":
            return len(weights) == len(inputs)
        return node.op_type == "Add" and _adds_one(node, weights)


def _adds_one(node: Node, weights: list[str]) -> bool:
    others = [value for value in node.inputs if value.name not in weights]
    return len(others) == 1 and others[0].const_value.size == 1 and others[0].const_value.numpy().item() == 1


@contextmanager
def folding_by(rule: Rule) -> Iterator[None]:
    """Have onnxscript's optimiser ask before it folds, and keep it from multiplying norms into kernels."""
    from onnxscript import optimizer, rewriter
    from onnxscript.rewriter.rules.common import _fuse_batchnorm

    original, rules = optimizer.optimize_ir, rewriter._DEFAULT_REWRITE_RULES  # noqa: SLF001 - there is no option for it
    multiplying = {id(rule) for rule in _fuse_batchnorm.rules}

    def optimize_ir(model: Any, *args: Any, **options: Any) -> Any:  # noqa: ANN401
        options["should_fold"] = rule
        return original(model, *args, **options)

    optimizer.optimize_ir = optimize_ir
    rewriter._DEFAULT_REWRITE_RULES = tuple(known for known in rules if id(known) not in multiplying)  # noqa: SLF001
    try:
        yield
    finally:
        optimizer.optimize_ir, rewriter._DEFAULT_REWRITE_RULES = original, rules  # noqa: SLF001
