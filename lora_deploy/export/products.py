"""Find where a graph multiplies by a weight, and which checkpoint tensors that weight is, side by side.

A low-rank update of a matrix can be computed beside its product only where there is one: ``y = x · W``. Promise: every
node that reads a weight is looked at; what is no such product is an obstacle that names the node, never passed over.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lora_deploy.export.binding_table import (
    BindingTable,
    BoundComponent,
    Joined,
    Origin,
    Taken,
    describe,
    taken_tensors,
)
from lora_deploy.export.drawn import initializers
from lora_deploy.tensors import DType, TensorSpec

_TURNED = (1, 0)
_PRODUCTS = {("", "MatMul"), ("", "Gemm"), ("com.microsoft", "FusedMatMul")}
_UNCHANGED = {"transA": 0, "transBatchA": 0, "transBatchB": 0, "alpha": 1.0}
"""What attributes of a product must be, so that it is ``x · W`` and nothing else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """A checkpoint tensor as a product takes it: a matrix (in, out)."""

    tensor: str
    n_in: int
    n_out: int
    is_turned: bool
    """Whether the checkpoint stores (out, in), as linear layers do; (in, out) else, as Conv1D does."""
    dtype: DType


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Product:
    """A node ``y = x · W``."""

    node: Any
    """An ``onnx_ir.Node``: x is its first input, y its first output."""
    factors: tuple[Factor, ...]
    """What W is made of, along its outputs."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Products:
    """What one graph does with its weights."""

    found: tuple[Product, ...]
    obstacles: Mapping[str, str]
    """By tensor, what else reads it: beside that no update can be computed."""


def agreed(products: Iterable[Products]) -> tuple[dict[str, Factor], dict[str, str]]:
    """Tensors that graphs multiply by in one way and use in no other; and of the others, what is in the way."""
    factors: dict[str, Factor] = {}
    obstacles: dict[str, str] = {}
    for graph in products:
        obstacles.update(graph.obstacles)
        for factor in (factor for product in graph.found for factor in product.factors):
            if factors.setdefault(factor.tensor, factor) != factor:
                obstacles.setdefault(factor.tensor, "it is multiplied by in two layouts or formats")
    return {name: factor for name, factor in factors.items() if name not in obstacles}, obstacles


def products_of(
    model: Any,  # noqa: ANN401 - an onnx_ir.Model
    component: BoundComponent,
    table: BindingTable,
    specs: Mapping[str, TensorSpec],
) -> Products:
    """Look at every node that reads a weight; ``specs`` are the checkpoint's tensors."""
    found: list[Product] = []
    obstacles: dict[str, str] = {}
    values = initializers(model)
    for name, position in component.slots.items():
        slot = table.slots[position]
        names = [taken.tensor for taken in taken_tensors(slot.origin)]
        for node, index, is_turned in _readers(values[name], is_turned=False):
            product = _product(node, index, slot.origin, DType(slot.dtype), specs, is_turned=is_turned)
            if isinstance(product, str):
                obstacles.update(dict.fromkeys(names, f"{component.file}: {product}"))
            else:
                found.append(product)
    return Products(found=tuple(found), obstacles=obstacles)


def _readers(value: Any, *, is_turned: bool) -> Iterator[tuple[Any, int, bool]]:  # noqa: ANN401 - an onnx_ir.Value
    """Nodes that read a value, as which input, and whether it was transposed on the way."""
    for node, index in value.uses():
        if (node.domain, node.op_type) == ("", "Transpose") and tuple(_attribute(node, "perm", _TURNED)) == _TURNED:
            yield from _readers(node.outputs[0], is_turned=not is_turned)
        else:
            yield node, index, is_turned


def _product(
    node: Any,  # noqa: ANN401
    index: int,
    origin: Origin,
    dtype: DType,
    specs: Mapping[str, TensorSpec],
    *,
    is_turned: bool,
) -> Product | str:
    """Make a product of a node that reads a weight as its input ``index``, or say why it is none."""
    if (node.domain, node.op_type) not in _PRODUCTS or index != 1:
        return f"{node.op_type} reads it"
    odd = [name for name, usual in _UNCHANGED.items() if _attribute(node, name, usual) != usual]
    if odd:
        return f"{node.op_type} reads it with {odd[0]} {_attribute(node, odd[0], 0)}"
    is_turned ^= bool(_attribute(node, "transB", 0))
    joined = origin if isinstance(origin, Joined) and not origin.is_stack else None
    parts = joined.parts if joined else (origin,) if isinstance(origin, Taken) else ()
    factors = [_factor(part, dtype, specs, is_turned=is_turned) for part in parts]
    along = joined.axis if joined else 1
    if not factors or None in factors or (len(factors) > 1 and (along == 1) is is_turned):
        return f"{node.op_type} reads it {describe(origin)}"
    return Product(node=node, factors=tuple(factor for factor in factors if factor is not None))


def _factor(part: Origin, dtype: DType, specs: Mapping[str, TensorSpec], *, is_turned: bool) -> Factor | None:
    """A part of a weight as a matrix (in, out); None where it is no whole matrix of the checkpoint."""
    if not isinstance(part, Taken):
        return None
    shape = specs[part.tensor].shape if part.tensor in specs else ()
    is_permuted = part.permutation == _TURNED
    if len(shape) != 2 or part.shape != (shape[::-1] if is_permuted else shape) or part.plus:
        return None
    n_in, n_out = shape
    factor = Factor(tensor=part.tensor, n_in=n_in, n_out=n_out, is_turned=False, dtype=dtype)
    return replace(factor, n_in=n_out, n_out=n_in, is_turned=True) if is_permuted is not is_turned else factor


def _attribute(node: Any, name: str, usual: Any) -> Any:  # noqa: ANN401
    found = node.attributes.get(name)
    return usual if found is None else found.value
