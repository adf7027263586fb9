"""GLORA: ``W' = W + W ⊙ A + B`` and, where the layer has a bias, ``b' = b + b ⊙ D + E + W·C``.

Each of A to E is a product ``Xd·Xu``, a whole ``X`` (a column, a vector or one number), or zeros.
Source: GLoRA, arXiv:2306.07967; peft 0.21.2, ``tuners/glora/layer.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from pydantic import Field
from torch import Tensor

from lora_deploy.adapter import ModuleUpdate, OfWeight, Orientation, Shapeless
from lora_deploy.adapters.adapted import Adapted
from lora_deploy.adapters.tuners.config import TunerConfig
from lora_deploy.adapters.tuners.interface import Reading, Tuner
from lora_deploy.errors import UnmergeableAdapterError
from lora_deploy.updates.affine import Affine
from lora_deploy.updates.hadamard import Pair


class GloraConfig(TunerConfig):
    """Configuration of GLORA; what each path is, its tensors show."""

    r: int = Field(default=8, gt=0)
    config_A_B: str | None = None  # noqa: N815 - PEFT's names
    config_C: str | None = None  # noqa: N815
    config_D_E: str | None = None  # noqa: N815


Path = Pair | Tensor | None
"""A product, a whole tensor, or zeros."""


def read_module(module: Adapted) -> Iterator[ModuleUpdate]:
    """Make the updates of a module's weight and, where something trained it, of its bias.

    Raises:
        MalformedAdapterError: Its tensors do not fit each other.
    """
    factor, shift = _path(module, "A"), _path(module, "B")
    trained = tuple(
        module.any_factor(slot, n_least=1) for slot in module.slots if slot[:7] in _OF_WEIGHT and _is_trained(slot)
    )
    weight = Shapeless(
        kind=Affine.kind,
        known=_known(module, factor, shift),
        make=partial(_of_weight, factor, shift),
        tensors=trained,
    )
    # The bias is named here, too: where the base has none, nothing else does.
    yield module.update(weight, orientation=Orientation.STORED)
    column, scale, bias = _path(module, "C"), _path(module, "D"), _path(module, "E")
    if column is not None or scale is not None or bias is not None:
        update = OfWeight(
            kind=Affine.kind,
            weight=f"{module.path}.weight",
            column=_column(module, column),
            make=partial(_of_bias, module, scale, bias),
        )
        keys = [key for slot, key in module.slots.items() if slot[:7] not in _OF_WEIGHT]
        of_bias = module.update(update, keys=keys, orientation=Orientation.STORED, parameter="bias")
        yield replace(of_bias, is_optional=True)


_OF_WEIGHT = frozenset({"glora_A", "glora_B"})


def _is_trained(slot: str) -> bool:
    return not slot.endswith("zeros")


def _path(module: Adapted, name: str) -> Path:
    """Give one of the five matrices as it was trained."""
    slots = {slot.rpartition(".")[2]: slot for slot in module.slots if slot.startswith(f"glora_{name}.")}
    if slots.keys() == {"Xd", "Xu"}:
        up, down = module.factor(slots["Xd"], None, None), module.factor(slots["Xu"], None, None)
        if up.shape[1] != down.shape[0]:
            raise module.malformed(f"{name} is {tuple(up.shape)} times {tuple(down.shape)}: the ranks differ")
        return Pair(up=up, down=down)
    if slots.keys() == {"X"}:
        whole = module.any_factor(slots["X"], n_least=1)
        if whole.numel() != len(whole):
            raise module.malformed(f"{name} has shape {tuple(whole.shape)}, expected a column or one number")
        return whole.flatten()
    if slots.keys() <= {"zeros"}:
        if any(bool(module.file.tensors[module.slots[slot]].any()) for slot in slots.values()):
            raise module.malformed(f"{name} is not trained, and not zero")
        return None
    raise module.malformed(f"{name} has {', '.join(sorted(slots))}, expected Xd and Xu, or X")


def _known(module: Adapted, *paths: Path) -> tuple[int | None, int | None]:
    """(out, in) as far as the paths of the weight show them."""
    outs = {path.shape[0] if isinstance(path, Pair) else len(path) for path in paths if path is not None} - {1}
    ins = {path.shape[1] for path in paths if isinstance(path, Pair)}
    if len(outs) > 1 or len(ins) > 1:
        raise module.malformed(f"its matrices have {sorted(outs)} outputs and {sorted(ins)} inputs")
    return next(iter(outs), None), next(iter(ins), None)


def _column(module: Adapted, path: Path) -> Tensor | None:
    if isinstance(path, Pair):
        if path.shape[1] != 1:
            raise module.malformed(f"C is {path.shape}, expected one column")
        return path.rows(slice(None))[:, 0]
    return path


def _of_weight(factor: Path, shift: Path, n_out: int, n_in: int) -> Affine:
    return Affine(factor=_spread(factor, n_out, n_in), shift=_spread(shift, n_out, n_in))


def _of_bias(module: Adapted, scale: Path, bias: Path, product: Tensor) -> Affine:
    n_out = len(product)
    for name, path in (("D", scale), ("E", bias)):
        if isinstance(path, Pair) or (path is not None and len(path) not in {1, n_out}):
            raise UnmergeableAdapterError(f"{module.path}: {name} fits no bias of {n_out} outputs")
    shift = _spread(bias, n_out, 1).rows(slice(None)) + product[:, None]
    one = torch.ones((1, 1), dtype=torch.float64)
    return Affine(factor=_spread(scale, n_out, 1), shift=Pair(up=shift, down=one))


def _spread(path: Path, n_out: int, n_in: int) -> Pair:
    """A matrix (out, in) of equal columns, of equal elements, or of zeros, as a product."""
    if isinstance(path, Pair):
        return path
    if path is None:
        return Pair(up=torch.zeros(n_out, 0), down=torch.zeros(0, n_in))
    return Pair(up=path.expand(n_out)[:, None], down=torch.ones(1, n_in))


def _read(modules: Sequence[Adapted], config: GloraConfig) -> Reading:
    del config
    return Reading(updates=[update for module in modules for update in read_module(module)])


TUNER = Tuner(peft_type="GLORA", config=GloraConfig, slots=(("glora_[A-E]", r"\.(?:X[du]?|zeros)"),), read=_read)
