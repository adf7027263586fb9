"""The orders of rounding in which peers merge, and whether one of them explains a stored tensor.

The definition rounds once. Peers load the base in a working dtype, round the factors, the product, the delta, the
sum, and the sum again when it is stored. An ``Order`` names what is rounded to what; these are those of peft 0.21.2
(``tuners/lora/layer.py`` and ``dora.py``: autocast or not, ``safe_merge`` or not, CPU or GPU), of mergekit 0.1.5,
which loads in any dtype, calls peft and casts again (``common.py:ModelReference.merged``, ``io/tasks.py``), of
Unsloth (float32 sum), and of those that scale one factor first (torchtune, mlx-lm).

Tolerance. A tensor is explained when *one* order holds for all of its elements: each is the definition's own value,
or lies in the enclosure of what that order gives. Rounding is monotone, so the enclosure is the ends rounded step by
step; its width comes only from what float32 arithmetic may lose in a product of rank r (r + 4 units of float32),
which nearly always rounds away: one value, or two neighbours where it does not, a step of weight or delta apart.
Factorisations (PiSSA, OLoRA, KaSA), which peers do in float32, may differ by 2^-14 of the weight's root mean square.
Kinds that are evaluated as they are defined may differ by 2^-14 of what they add (``defined``).

Why this hides nothing. An element that was left at the base's value passes only where an order that explains all the
other elements gives just that value there: then no byte could tell. A tensor of which that is true throughout is not
passed but called inconclusive.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lora_deploy.merge.plan import PlannedTensor
from lora_deploy.rounding import dtype_of
from lora_deploy.tensors import DType
from lora_deploy.updates.addition import Addition
from lora_deploy.updates.dora import Dora
from lora_deploy.updates.low_rank import LowRank
from lora_deploy.updates.residual import WithoutComponent


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What is rounded to what, on the way from base and factors to the stored tensor."""

    work: DType
    """Dtype of the model while it is merged."""
    factors: DType | None = None
    """Dtype that A and B are rounded to; None: as the adapter stores them."""
    product: DType = DType.F32
    """Dtype of B·A and of s·(B·A)."""
    passes: tuple[tuple[DType, ...], ...] = ((),)
    """Dtypes that s·B·A is rounded to before it is added; peft adds it twice to attention's ``out_proj``, whose scale
    holds both."""
    scales_up_first: bool = False
    """(s·B)·A instead of s·(B·A)."""

    @property
    def sum_dtype(self) -> DType:
        """The wider of model and delta: what peft adds, and takes norms, in."""
        delta = self.passes[0][-1] if self.passes[0] else DType.F32
        return next(
            (dtype for dtype in (self.work, delta) if holds(dtype, self.work) and holds(dtype, delta)), DType.F32
        )

    def __str__(self) -> str:
        parts = [f"weights in {self.work.long_name}"]
        if self.factors:
            parts.append(f"factors rounded to {self.factors.long_name}")
        if self.product is not DType.F32:
            parts.append(f"product in {self.product.long_name}")
        if self.scales_up_first:
            parts.append("B scaled first")
        for number, dtypes in enumerate(self.passes, start=1):
            which = f"delta {number} of {len(self.passes)}" if len(self.passes) > 1 else "delta"
            parts += [f"{which} rounded to {dtype.long_name}" for dtype in dtypes]
        return ", ".join(parts)


def known_orders(tensor: PlannedTensor) -> tuple[Order, ...]:
    """List the orders that may have made a tensor of this dtype from its base and updates, each once."""
    base = tensor.source.dtype if tensor.source is not None else tensor.spec.dtype
    if not base.is_floating or not tensor.spec.dtype.is_floating:
        return ()
    works = dict.fromkeys((base, tensor.spec.dtype, DType.F32, DType.BF16, DType.F16, DType.F64))
    if not tensor.updates:
        return tuple(Order(work=work) for work in works if not holds(work, base))
    own = next((dtype for entry in tensor.updates for dtype in _factor_dtypes(entry.update)), DType.F32)
    orders = [order for work in works for order in _orders_in(work, own)]
    if tensor.spec.name.endswith("out_proj.weight"):
        orders += [replace(order, passes=order.passes * 2) for order in orders]
        orders += [Order(work=work, passes=((work,), ())) for work in works]
    return tuple(dict.fromkeys(orders))


def _orders_in(work: DType, own: DType) -> Iterator[Order]:
    """Combine what is rounded in one working dtype, leaving out what changes nothing."""
    rounded = None if holds(work, own) else work
    combinations: tuple[tuple[DType | None, DType, tuple[DType, ...], bool], ...] = (
        (None, DType.F32, (), False),  # peft with autocast, unsafe; Unsloth; any float32 sum
        (None, DType.F32, (work,), False),  # peft with autocast, safe_merge; embeddings; fused experts
        (rounded, DType.F32, (work,), False),  # peft without autocast, on a CPU
        (rounded, work, (work,), False),  # the same on a GPU
        (None, DType.F32, (own,), False),  # peft without autocast, low_cpu_mem_usage
        (None, DType.F32, (own, work), False),
        (None, own, (own,), False),
        (None, own, (own, work), False),
        (None, own, (own, work), True),  # mlx-lm
        (rounded, work, (work,), True),  # torchtune
    )
    for factors, product, delta, scales_up_first in combinations:
        kept = tuple(dict.fromkeys(dtype for dtype in delta if not holds(dtype, DType.F32)))
        is_low = not holds(product, DType.F32)
        yield Order(
            work=work,
            factors=factors,
            product=product if is_low else DType.F32,
            passes=(kept,),
            scales_up_first=scales_up_first and is_low,
        )


_PRECISION = {DType.F64: (53, 1022), DType.F32: (24, 126), DType.F16: (11, 14), DType.BF16: (8, 126)}
"""Bits of the significand, and the exponent of the smallest normal value, negated."""


def holds(wide: DType, narrow: DType) -> bool:
    """Whether every value of one format is a value of the other."""
    return all(a >= b for a, b in zip(_PRECISION[wide], _PRECISION[narrow], strict=True))


def _factor_dtypes(update: object) -> Iterator[DType]:
    if isinstance(update, LowRank):
        yield dtype_of(update.down)
    elif isinstance(update, WithoutComponent):
        yield from _factor_dtypes(update.low_rank)
    elif isinstance(update, Dora):
        yield from _factor_dtypes(update.inner)
    elif isinstance(update, Addition):
        yield dtype_of(update.values)


def unit_of(dtype: DType) -> float:
    """How far rounding to a format may move a value, relative to it."""
    return 2.0 ** -_PRECISION[dtype][0]
