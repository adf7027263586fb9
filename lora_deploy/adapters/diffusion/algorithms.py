"""The updates that the tensors of one module make, told by their names: a file mixes what LyCORIS calls algorithms.

    LoRA, LoCon    s·up·down, with a core tensor between them on convolutions; s is alpha / r
    LoHa, LoKr     products; LoKr with both factors whole has scale 1, whatever alpha says
    OFT, BOFT      outputs turned by the Cayley transform (I + Q)(I − Q)⁻¹, transposed in OFT; alpha limits Q
    GLoRA, IA3     W + s·(W·P·Q + B·A), and rows or columns times 1 + w
    diff, norm     differences of weights and biases, as they are
    DoRA           any of the first three renormed, by rows or by columns as the magnitude's shape says

Source: LyCORIS 4.1.3, ``modules/``; sd-scripts 0.9, ``networks/lora.py`` and ``networks/oft.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial

import torch
from torch import Tensor

from lora_deploy.adapter import ModuleUpdate, Orientation, Shapeless
from lora_deploy.adapters.adapted import Adapted
from lora_deploy.adapters.diffusion.turns import turned
from lora_deploy.adapters.factors import low_rank
from lora_deploy.adapters.products import loha, lokr
from lora_deploy.errors import UnmergeableAdapterError
from lora_deploy.updates.addition import Addition
from lora_deploy.updates.additive import Additive
from lora_deploy.updates.dora import Dora
from lora_deploy.updates.hadamard import Pair
from lora_deploy.updates.interface import Scale, Update
from lora_deploy.updates.low_rank import LowRank
from lora_deploy.updates.mixed_inputs import MixedInputs
from lora_deploy.updates.rescaling import Rescaling

ScaleOf = Callable[[int], Scale]

_AS_IS = Scale(factor=Fraction(1), source="1: a difference, added as it is")
_WHOLE = Scale(factor=Fraction(1), source="1: both factors of LoKr are whole, alpha does not count")


def updates_of(module: Adapted, scale_of: ScaleOf) -> Iterator[ModuleUpdate]:
    """Yield the updates of one module's parameters; ``scale_of`` gives its scale for a rank.

    Raises:
        MalformedAdapterError: Tensors that make no algorithm, or do not fit each other.
        UnmergeableAdapterError: No weights can express them.
    """
    rest = {*module.slots}
    for name, signs, others, make in _ALGORITHMS:
        if not rest.isdisjoint(signs):
            used = rest & {*signs, *others}
            update = make(module, scale_of)
            yield module.update(
                update, keys=_keys(module, used), orientation=Orientation.STORED, method=_called(name, module)
            )
            rest -= used
    for slot, parameter in (("diff_b", "bias"), ("b_norm", "bias"), ("up_bias", "bias")):
        if slot in rest:
            scale = scale_of(int(module.any_factor("up").shape[1])) if slot == "up_bias" else _AS_IS
            update = Addition(values=module.factor(slot, None), scale=scale)
            yield module.update(
                update,
                keys=_keys(module, {slot}),
                orientation=Orientation.STORED,
                parameter=parameter,
                method="norm" if slot == "b_norm" else "bias",
            )
            rest -= {slot}
    if rest:
        raise module.malformed(f"{', '.join(sorted(rest))} without the tensors that belong to it")


def _called(name: str, module: Adapted) -> str:
    """Name an algorithm as its users do."""
    shapes = {slot: module.file.tensors[key].ndim for slot, key in module.slots.items()}
    if name == "LoRA" and shapes.get("down", 0) > 2:
        name = "LoCon"
    if name == "OFT" and shapes["oft_blocks"] > 3:
        name = "BOFT"
    return f"{name} with DoRA" if "magnitude" in module.slots else name


def _keys(module: Adapted, slots: set[str]) -> list[str]:
    return [key for slot, key in module.slots.items() if slot in slots]


def _lora(module: Adapted, scale_of: ScaleOf) -> Update:
    down, up = module.any_factor("down"), module.any_factor("up")
    rank = int(down.shape[0])
    if "mid" in module.slots:
        core = module.any_factor("mid")
        if tuple(core.shape[:2]) != (up.shape[1], rank) or math.prod([*down.shape[2:], *up.shape[2:]]) != 1:
            raise module.malformed(f"core {tuple(core.shape)} does not fit {tuple(down.shape)} and {tuple(up.shape)}")
        inner = down.flatten(1).to(torch.float64)
        down = torch.einsum("ij...,jp->ip...", core.to(torch.float64), inner)
        up = up.flatten(1).reshape(*up.shape[:2], *(1,) * (core.ndim - 2))
    update = low_rank(module.file, module.path, down, up, _scaled(module, scale_of(rank)))
    return _renormed(module, update, n_kernel=math.prod(down.shape[2:]))


def _scaled(module: Adapted, scale: Scale) -> Scale:
    """Multiply by ``scalar``, which LyCORIS may train beside the factors."""
    scalar = module.number("scalar")
    return scale if scalar is None else scale.times(scalar, f"{scale.source}, times scalar {float(scalar):g}")


def _loha(module: Adapted, scale_of: ScaleOf) -> Update:
    update = loha(module, lambda rank: _scaled(module, scale_of(rank)))
    return _renormed(module, update, n_kernel=_n_kernel(module, "hada_t1"))


def _lokr(module: Adapted, scale_of: ScaleOf) -> Update:
    update = lokr(module, lambda rank: _scaled(module, _WHOLE if rank is None else scale_of(rank)))
    slot = "lokr_w2" if "lokr_w2" in module.slots else "lokr_t2"
    return _renormed(module, update, n_kernel=_n_kernel(module, slot))


def _n_kernel(module: Adapted, slot: str) -> int | None:
    """Positions of a kernel as far as a tensor shows them; None where it does not."""
    key = module.slots.get(slot)
    return None if key is None else math.prod(module.file.tensors[key].shape[2:])


def _renormed(module: Adapted, update: LowRank | Additive, *, n_kernel: int | None) -> Update:
    """Give the update its learned lengths, if it has some."""
    if "magnitude" not in module.slots:
        return update
    stored = module.any_factor("magnitude", n_least=1)
    sides = (int(stored.shape[0]), int(stored.shape[1]) if stored.ndim > 1 else 1)
    if math.prod(stored.shape[2:]) != 1 or 1 not in sides:
        raise module.malformed(f"magnitude has shape {tuple(stored.shape)}, expected (out, 1) or (1, in)")
    n_rows, n_cols = update.shape
    if sides == (n_rows, 1):
        return Dora(inner=update, magnitude=stored.flatten(), axis="rows")
    n_joint, rest = divmod(n_cols, sides[1])
    if sides[0] != 1 or rest or n_kernel not in (None, n_joint):
        raise module.malformed(f"magnitude has shape {tuple(stored.shape)}, the update is {update.shape}")
    return Dora(inner=update, magnitude=stored.flatten(), axis="columns", n_joint=n_joint)


def _glora(module: Adapted, scale_of: ScaleOf) -> Update:
    if "bm.weight" in module.slots:
        raise UnmergeableAdapterError(f"{module.file.path}: {module.path}: GLoRA with a core tensor (bm) is not read")
    sides = {name: module.any_factor(f"{name}.weight") for name in ("a1", "a2", "b1", "b2")}
    mix = Pair(up=sides["a1"].flatten(1), down=sides["a2"].flatten(1))
    product = Pair(up=sides["b1"].flatten(1), down=sides["b2"].flatten(1))
    rank, n_inputs = mix.down.shape[0], mix.shape[0]
    fits = mix.up.shape[1] == rank and product.up.shape[1] == product.down.shape[0] and mix.shape[0] == mix.shape[1]
    if not fits or product.shape[1] % n_inputs:
        raise module.malformed(f"factors of shapes {', '.join(str(tuple(side.shape)) for side in sides.values())}")
    return MixedInputs(mix=mix, product=product, scale=_scaled(module, scale_of(rank)))


def _ia3(module: Adapted, scale_of: ScaleOf) -> Shapeless:
    del scale_of
    if "weight" not in module.slots:
        raise module.malformed("has on_input but no weight")
    stored = module.any_factor("weight", n_least=1)
    on_input = bool(module.integers("on_input", *module.sides("on_input"), below=2).any())
    factors = 1 + stored.flatten().to(torch.float64)
    known = (None, None) if on_input and stored.ndim > 1 else (None, len(factors)) if on_input else (len(factors), None)
    make = partial(_rescaling, module, factors, on_input)
    return Shapeless(kind=Rescaling.kind, known=known, make=make, tensors=(stored,), takes_kernels=True)


def _rescaling(module: Adapted, factors: Tensor, on_input: bool, n_out: int, n_in: int) -> Rescaling:  # noqa: FBT001 - bound
    if not on_input:
        return Rescaling(factors=factors, axis="rows", n_other=n_in)
    n_joint, rest = divmod(n_in, len(factors))
    if rest:
        raise UnmergeableAdapterError(f"{module.path}: {len(factors)} factors, base has {n_in} columns, no multiple")
    return Rescaling(factors=factors.repeat_interleave(n_joint), axis="columns", n_other=n_out)


def _difference(slot: str, module: Adapted, scale_of: ScaleOf) -> Update:
    del scale_of
    return Addition(values=module.any_factor(slot, n_least=1), scale=_AS_IS)


_SCALED = ("alpha", "scalar")
_ALGORITHMS: tuple[
    tuple[str, tuple[str, ...], tuple[str, ...], Callable[[Adapted, ScaleOf], Update | Shapeless]], ...
] = (
    ("LoRA", ("down", "up"), ("mid", "magnitude", *_SCALED), _lora),
    (
        "LoHa",
        ("hada_w1_a", "hada_w2_a"),
        ("hada_w1_b", "hada_w2_b", "hada_t1", "hada_t2", "magnitude", *_SCALED),
        _loha,
    ),
    (
        "LoKr",
        ("lokr_w1", "lokr_w1_a", "lokr_w2", "lokr_w2_a"),
        ("lokr_w1_b", "lokr_w2_b", "lokr_t2", "magnitude", *_SCALED),
        _lokr,
    ),
    ("OFT", ("oft_blocks",), ("rescale", "alpha"), turned),
    ("GLoRA", ("a1.weight", "b1.weight"), ("a2.weight", "b2.weight", "bm.weight", *_SCALED), _glora),
    ("IA3", ("on_input",), ("weight",), _ia3),
    ("full", ("diff",), ("alpha",), partial(_difference, "diff")),
    ("norm", ("w_norm",), (), partial(_difference, "w_norm")),
)
"""Name, slots by which an algorithm is known, those that it may have besides, and what makes its update."""
