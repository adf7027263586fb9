"""Elementwise and Kronecker products of factors, as LyCORIS writes them and PEFT after it.

``Δ = s·(w1_a·w1_b) ⊙ (w2_a·w2_b)`` (LoHa) and ``Δ = s·w1 ⊗ w2`` (LoKr), where w1 and w2 of LoKr are whole or products.
A core tensor (``hada_t1``, ``lokr_t2``: CP or Tucker decomposition of a convolution) is folded into the right factor,
in float64.
Source: LyCORIS 4.1.3, ``modules/loha.py`` and ``modules/lokr.py``; peft 0.21.2, ``tuners/loha/layer.py``
(``HadaWeightCP``) and ``tuners/lokr/layer.py`` (``rebuild_tucker``).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lora_deploy.adapters.adapted import Adapted
from lora_deploy.updates.hadamard import Hadamard, Pair
from lora_deploy.updates.interface import Scale
from lora_deploy.updates.kronecker import Kronecker


def loha(module: Adapted, scale_of: Callable[[int], Scale]) -> Hadamard:
    """Make the update of one module; ``scale_of`` gives the scale for a rank.

    Raises:
        MalformedAdapterError: Its factors do not fit each other.
    """
    pairs, rank = [], 0
    for name in ("1", "2"):
        core = module.slots.get(f"hada_t{name}")
        first, second = module.factor(f"hada_w{name}_a", None, None), module.factor(f"hada_w{name}_b", None, None)
        rank = second.shape[0]
        if core is None:
            pairs.append(_pair(module, first, second))
        else:
            pairs.append(_cp_pair(module, _core(module, f"hada_t{name}"), first, second))
    if pairs[0].shape != pairs[1].shape:
        raise module.malformed(f"its products are {pairs[0].shape} and {pairs[1].shape}")
    return Hadamard(first=pairs[0], second=pairs[1], scale=scale_of(rank))


def lokr(module: Adapted, scale_of: Callable[[int | None], Scale]) -> Kronecker:
    """Make the update of one module; ``scale_of`` gives the scale for a rank, None where the tensors show none.

    Raises:
        MalformedAdapterError: Its factors do not fit each other.
    """
    left, rank = _whole_or_product(module, "lokr_w1")
    if left.ndim != 2:
        raise module.malformed(f"lokr_w1 has shape {tuple(left.shape)}, expected a matrix")
    if "lokr_t2" in module.slots:
        core = _core(module, "lokr_t2")
        first, second = module.factor("lokr_w2_a", core.shape[0], None), module.factor("lokr_w2_b", core.shape[1], None)
        pair = _cp_pair(module, core, first, second)
        right, rank = pair.rows(slice(None)), core.shape[0]
    else:
        right, found = _whole_or_product(module, "lokr_w2")
        rank = rank if rank is not None else found
    return Kronecker(left=left, right=right.flatten(1), scale=scale_of(rank))


def _whole_or_product(module: Adapted, name: str) -> tuple[Tensor, int | None]:
    """Give a factor that is saved whole, or the product that stands for it, and its rank."""
    if name in module.slots:
        n_axes = module.file.tensors[module.slots[name]].ndim
        return module.factor(name, *(None,) * max(n_axes, 2)), None
    pair = _pair(module, module.factor(f"{name}_a", None, None), module.factor(f"{name}_b", None, None))
    return pair.rows(slice(None)), pair.down.shape[0]


def _pair(module: Adapted, up: Tensor, down: Tensor) -> Pair:
    if up.shape[1] != down.shape[0]:
        raise module.malformed(f"factors of shapes {tuple(up.shape)} and {tuple(down.shape)} share no rank")
    return Pair(up=up, down=down)


def _core(module: Adapted, slot: str) -> Tensor:
    n_axes = module.file.tensors[module.slots[slot]].ndim
    return module.factor(slot, *(None,) * max(n_axes, 3))


def _cp_pair(module: Adapted, core: Tensor, first: Tensor, second: Tensor) -> Pair:
    """Fold a core (r, r, *k) and second (r, in) into one factor (r, in·k); first is (r, out)."""
    if (first.shape[0], second.shape[0]) != tuple(core.shape[:2]):
        raise module.malformed(
            f"core {tuple(core.shape)} does not fit factors {tuple(first.shape)} and {tuple(second.shape)}"
        )
    wide = core.to(torch.float64)
    down = torch.einsum("ij...,jr->ir...", wide, second.to(torch.float64)).flatten(1)
    return Pair(up=first.T, down=down)
